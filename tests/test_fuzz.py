"""Every decoder keeps its word: of whatever it is fed, it raises what it says and nothing else.

A slice of what ``python -m tests.fuzz`` runs for hours; which decoders there are, and what may
leave each, stands in ``tests/fuzz/decoders.py``.
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz.decoders import DECODERS, BrokenWordError, Decoder, outcomes

CASES = 1500
PACKAGES = ("trex_core", "voters", "listeners", "dashboard")
TOTALS = {
    "voters.gateway": "whatever comes is answered, or closes the connection",
    "sql.request": "whatever comes is answered, or closes the connection",
    "dashboard.sqltext": "a line that is no query is none",
    "listeners.source": "whatever comes is counted",
}
"""Those whose answer to bad input is no exception that the table of outcomes could show."""


@pytest.mark.filterwarnings("ignore:.*serial number")  # of cryptography, for a spoilt certificate
@pytest.mark.parametrize("name", DECODERS)
def test_nothing_else_is_raised(name):
    came_to = outcomes(name, range(CASES))
    assert came_to["taken"] >= CASES / 100, f"the cases reach nothing: {came_to}"
    if name not in TOTALS:
        assert len(came_to) > 1, f"nothing is refused: {came_to}"


def test_a_decoder_that_breaks_its_word_is_caught(monkeypatch):
    def decode(data):
        return data[5]

    monkeypatch.setitem(DECODERS, "bad", Decoder((ValueError,), lambda _: b"abc", decode))
    with pytest.raises(BrokenWordError, match=r"bad: IndexError: .*--only bad --case 3"):
        outcomes("bad", [3])


def test_one_that_believes_a_length_is_caught_and_the_table_is_told():
    """The command bounds its memory, which a test in this process must not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "60"],
        capture_output=True, text=True, cwd=ROOT, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = done.stdout.splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(DECODERS)
    assert last.startswith(f"{60 * len(DECODERS)} cases, 0 failures")


KNOWN = {
    # who decodes -> the decoders that try it; or why none need be
    "trex_core/wire.py": "wire.",
    "trex_core/metadata/commands.py": "metadata.",
    "trex_core/metadata/state.py": "metadata.state_from",
    "trex_core/metadata/ring.py": None,  # words of a digest of its own
    "trex_core/sessions.py": "sessions.",
    "trex_core/messages.py": "messages.",
    "trex_core/snapshot.py": "snapshot.",
    "trex_core/state.py": "journal.survey",
    "trex_core/access.py": "access.",
    "trex_core/cluster.py": "cluster.",
    "voters/config.py": "voters.decode_setup",
    "voters/journal.py": "journal.",
    "voters/driver.py": None,  # of a reply that wire.decode_reply took, from a voter by TLS
    "listeners/sql.py": "sql.",
    "listeners/listener.py": None,  # the genesis in a value that listeners.source looked at
    "listeners/store.py": None,  # what it wrote itself, in a database with checksums
    "dashboard/authority.py": None,  # files of the operator's own, read by access.holder_of
    "dashboard/cli.py": None,  # JSON that its own listener made
    "dashboard/sqltext.py": "dashboard.sqltext",
    "dashboard/recording.py": "dashboard.recording",
    "dashboard/demo.py": None,  # lines of its own children
}
FORMATS = {"msgpack", "json", "toml"}  # of msgspec
CALLS = {"Decoder", "loads", "unpack", "unpack_from", "load_pem_x509_certificate",
         "load_der_x509_certificate", "load_pem_private_key"}  # fmt: skip


def decodes(source: str) -> bool:
    """Whether a module calls what turns bytes into values."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            func = node.func
            name = func.attr if isinstance(func, ast.Attribute) else func.id
            of = func.value if isinstance(func, ast.Attribute) else None
            direct = name == "decode" and isinstance(of, ast.Attribute) and of.attr in FORMATS
            if name in CALLS or direct:
                return True
    return False


def test_no_module_decodes_that_is_not_listed():
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if decodes(path.read_text())
    }
    assert found == set(KNOWN), "add a decoder to tests/fuzz/decoders.py, then its module here"
    for module, prefix in KNOWN.items():
        assert prefix is None or any(name.startswith(prefix) for name in DECODERS), module
