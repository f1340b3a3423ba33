"""A wall clock that can be set: this module alone makes the library that lies about the time.

Preloaded into a process, it adds a number of seconds to CLOCK_REALTIME, and to nothing else: the
test writes the number into a file that the process has mapped, so the clock steps while it runs.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *shift_s;

__attribute__((constructor)) static void map_the_shift(void) {
    const char *path = getenv("TREX_TEST_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *mapped = mmap(0, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) shift_s = mapped;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    long done = syscall(SYS_clock_gettime, clock, now);
    if (done == 0 && shift_s && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *shift_s;
    return (int)done;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    if (where) *where = fine.tv_sec;
    return fine.tv_sec;
}
"""


def why_not() -> str:
    """Why no such library can be made here; "" when it can."""
    if os.uname().sysname != "Linux":
        return "the wall clock is shifted by a preloaded library, on Linux only"
    if shutil.which("cc") is None:
        return "the wall clock is shifted by a preloaded library, and there is no C compiler (cc)"
    return ""


class WallClock:
    """The shim, built in ``directory``, and the shift of each process that has it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._library = directory / "wallclock.so"
        source = directory / "wallclock.c"
        source.write_text(_SOURCE)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", self._library, source],
            check=True,
            capture_output=True,
        )

    def environment(self, name: str) -> dict[str, str]:
        """What the process ``name`` needs in its environment."""
        self.set(name, 0)
        return {"LD_PRELOAD": str(self._library), "TREX_TEST_CLOCK": str(self._file(name))}

    def set(self, name: str, shift_s: int) -> None:
        """From now on the wall clock of ``name`` is ``shift_s`` seconds off."""
        path = self._file(name)
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", shift_s))

    def _file(self, name: str) -> Path:
        return self._directory / f"clock-{name}"
