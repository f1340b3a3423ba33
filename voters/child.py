"""The archive process as its voter sees it: this module alone starts it, and starts it again.

The child gets all it must know as one argument and ends when its standard input does, so it dies
with the voter however that ends.  A voter works without it; only catch-up from here stands still.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Final

import msgspec

from trex_core.cluster import VoterEntry
from voters.config import Setup
from voters.frames import port_in_time
from voters.logs import log

RESTART_S_MIN: Final = 0.5
RESTART_S_MAX: Final = 10.0
END_S_MAX: Final = 2.0
"""How long the child has for ending when its standard input ended, in seconds."""


async def check_port(entry: VoterEntry) -> None:
    """Raise ``StartError`` if the archive's port cannot be bound: better said by the voter than by
    a child that starts again and again."""
    key = f"voters: archive_port of voter {entry.id}"
    (await port_in_time(entry.host, entry.archive_port, key)).close()


class ArchiveChild:
    """The archive process of one voter. ``run`` keeps it running."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._revoked = b"[]\n"

    def revoke(self, serials: frozenset[str]) -> None:
        """Tell it which certificates are no longer good, now and at each start."""
        self._revoked = msgspec.json.encode(sorted(serials)) + b"\n"
        self._tell()

    def _tell(self) -> None:
        process = self._process
        if process is not None and process.returncode is None and process.stdin is not None:
            process.stdin.write(self._revoked)

    async def run(self) -> None:
        """Run the process until cancelled; when it ends by itself, run it again."""
        setup = self._setup
        restart_s = RESTART_S_MIN
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "voters.archive", "--setup", setup.encode()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            self._process = child
            self._tell()
            try:
                assert child.stdout is not None
                if (await child.stdout.readline()).strip() == b"ready":
                    log(logging.INFO, "voter.archive.ready", voter=setup.voter, pid=child.pid)
                code = await child.wait()
            finally:
                self._process = None
                await asyncio.shield(_end(child))
            if loop.time() - started_s > RESTART_S_MAX:
                restart_s = RESTART_S_MIN
            log(
                logging.WARNING,
                "voter.archive.ended",
                voter=setup.voter,
                code=code,
                again_s=restart_s,
            )
            await asyncio.sleep(restart_s)
            restart_s = min(RESTART_S_MAX, 2 * restart_s)


async def _end(child: asyncio.subprocess.Process) -> None:
    """Let the child see the end of its standard input; kill it if that does not help."""
    if child.returncode is not None:
        return
    assert child.stdin is not None
    child.stdin.close()
    try:
        async with asyncio.timeout(END_S_MAX):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()
