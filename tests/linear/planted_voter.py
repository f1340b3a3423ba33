"""A voter with a defect planted, to try the trials by: they have to find it.

``python -m tests.linear.planted_voter DEFECT run --id N`` is ``python -m voters run --id N``, the
named lines of its source read as others. An edit whose text is not found exactly once fails loudly.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import CodeType, ModuleType

Edit = tuple[str, str]

DEFECTS: dict[str, dict[str, Edit]] = {
    "a leader for ever": {
        "voters.server": ("if role.beat_acked <= read.after_beat or self", "if self"),
        "trex_core.paxos": (
            "if tick - role.quorum_tick > config.election_ticks_min:",
            "if tick - role.quorum_tick > 1_000_000:",
        ),
    },
    "applied again": {
        "trex_core.sessions": (
            "        delivered = _again(session, slot, value.sequence)\n",
            """\
        delivered = _again(session, slot, value.sequence)
        if value.sequence < expected and value.kind == Kind.COMMAND:
            delivered = Delivered(slot, *apply(slot, value.command))
""",
        ),
    },
}
"""By name: in which module what is read as what. The first answers reads without asking a quorum,
and leads on without one; the second applies a command as often as it is sent."""


class _Edited(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, edit: Edit) -> None:
        super().__init__(name, path)
        self._edit = edit

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - as it is called
        old, new = self._edit
        source = self.get_data(self.path).decode()
        if source.count(old) != 1:
            raise LookupError(f"{self.path}: {source.count(old)} times, not once:\n{old}")
        return compile(source.replace(old, new), self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, edits: dict[str, Edit]) -> None:
        self._edits = edits

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._edits:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None and spec.origin is not None, fullname
        spec.loader = _Edited(fullname, spec.origin, self._edits[fullname])
        return spec


def main() -> None:
    """Plant the defect named first, then be a voter."""
    defect = sys.argv.pop(1)
    sys.meta_path.insert(0, _Finder(DEFECTS[defect]))
    from voters.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
