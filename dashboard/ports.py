"""Free ports of this machine: this module alone finds them, and keeps others out while in use."""

from __future__ import annotations

import random
import socket
from typing import Final

PORTS_FIRST: Final = 10_240
"""Lowest port used: above the well-known ones."""
PORTS_LAST: Final = 32_000
"""Highest port used: below those the kernel hands out to outgoing connections."""
BLOCK_PORTS: Final = 32
"""Ports of one block: a guard, three for each of seven voters, two for the stream, spare ones."""
PORTS_A_VOTER: Final = 3


class PortBlock:
    """Consecutive ports of 127.0.0.1 that no other block on this machine uses while it is open.

    The first one is bound for as long as the block is open and so keeps others out; the rest are
    checked to be free for TCP and UDP. Raises ``OSError`` when the machine has no free block.
    """

    def __init__(self) -> None:
        blocks = list(range(PORTS_FIRST, PORTS_LAST, BLOCK_PORTS))
        random.shuffle(blocks)
        for base in blocks:
            guard = socket.socket()
            try:
                guard.bind(("127.0.0.1", base))
                for port in range(base + 1, base + BLOCK_PORTS):
                    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                        with socket.socket(type=kind) as probe:
                            probe.bind(("127.0.0.1", port))
            except OSError:
                guard.close()
                continue
            self._guard = guard
            self.ports: tuple[int, ...] = tuple(range(base + 1, base + BLOCK_PORTS))
            return
        raise OSError(
            f"no free block of {BLOCK_PORTS} ports between {PORTS_FIRST} and {PORTS_LAST}"
        )

    def close(self) -> None:
        """Let others have the ports."""
        self._guard.close()
