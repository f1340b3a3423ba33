"""A terminal for tests: a program in a pty, its keys, and what its screen shows, as text."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

_PIECE = re.compile(
    r"\x1b\[(?P<args>[0-9;?<>=]*)(?P<command>[@-~])"  # control sequence
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # title and the like
    r"|\x1bP[^\x1b]*\x1b\\"
    r"|\x1b[^\[\]P]"
    r"|(?P<control>[\r\n\b])"
    r"|(?P<text>[^\x1b\x00-\x1f]+)"
)


class Screen:
    """As much of a terminal as places text: cursor, clearing, lines. No colours, no scrolling back.
    What is cut off in the middle of a sequence waits for the rest."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._cells = [[" "] * width for _ in range(height)]
        self._row = self._column = 0
        self._rest = ""

    @property
    def text(self) -> str:
        """The lines, without blanks at their ends."""
        return "\n".join("".join(row).rstrip() for row in self._cells)

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        at = 0
        while at < len(text):
            found = _PIECE.match(text, at)
            if found is None:
                if text[at] == "\x1b" and len(text) - at < 4096:
                    self._rest = text[at:]
                    return
                at += 1
                continue
            at = found.end()
            if found["text"]:
                self._write(found["text"])
            elif found["control"]:
                self._control(found["control"])
            elif found["command"]:
                self._command(found["command"], found["args"])

    def _write(self, text: str) -> None:
        for each in text:
            if self._column < self.width and self._row < self.height:
                self._cells[self._row][self._column] = each
            self._column += 1

    def _control(self, control: str) -> None:
        if control == "\r":
            self._column = 0
        elif control == "\b":
            self._column = max(0, self._column - 1)
        elif self._row < self.height - 1:
            self._row += 1
        else:
            self._cells = [*self._cells[1:], [" "] * self.width]

    def _command(self, command: str, args: str) -> None:
        numbers = [int(each) if each.isdigit() else 0 for each in args.split(";")]
        match command:
            case "H" | "f":
                row, column = (*numbers, 0, 0)[:2]
                self._row = min(max(row, 1), self.height) - 1
                self._column = min(max(column, 1), self.width) - 1
            case "C":
                self._column += max(1, numbers[0])
            case "J" if numbers[0] == 2:
                self._cells = [[" "] * self.width for _ in range(self.height)]
            case "K":
                first = 0 if numbers[0] == 2 else self._column
                self._cells[self._row][first:] = [" "] * (self.width - first)
            case _:
                pass


_SIZES = ("COLUMNS", "LINES")


class Terminal:
    """``command`` running at a terminal of its own; a context manager that ends it."""

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        width: int = 120,
        height: int = 40,
    ) -> None:
        self.screen = Screen(width, height)
        self.raw = ""
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self._settings = termios.tcgetattr(theirs)
        self._ours, self._theirs = ours, theirs
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        # These two would be believed rather than the terminal.
        here = {name: value for name, value in os.environ.items() if name not in _SIZES}
        self.process = subprocess.Popen(
            [*map(str, command)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**here, "TERM": "xterm-256color", **(environment or {})},
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(0.0, timeout_s))
        if not ready:
            return False
        text = self._decode(os.read(self._ours, 1 << 16))
        self.raw += text
        self.screen.feed(text)
        return True

    def wait_for(self, pattern: str, timeout_s: float = 30) -> re.Match[str]:
        """Wait until the screen shows ``pattern``."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = re.search(pattern, self.screen.text)
            if found is not None:
                return found
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"no {pattern!r} in {timeout_s} s:\n{self.screen.text}"
            if self.process.poll() is not None and not self._read(0.2):
                raise AssertionError(f"it ended without {pattern!r}:\n{self.screen.text}")
            self._read(min(left_s, 0.2))

    def wait(self, timeout_s: float = 20) -> int:
        """Wait for its end; its exit code. What it still says is read."""
        deadline_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, f"it does not end:\n{self.screen.text}"
            self._read(0.1)
        while self._read(0.1):
            pass
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def restored(self) -> bool:
        """Whether the terminal is as it was: modes, main screen, cursor shown."""
        shown = self.raw.rfind("\x1b[?25h") > self.raw.rfind("\x1b[?25l")
        main = self.raw.rfind("\x1b[?1049l") > self.raw.rfind("\x1b[?1049h")
        return shown and main and termios.tcgetattr(self._theirs) == self._settings
