"""An ordinary Python class, replicated on three voters behind a typed proxy.

    python examples/replicated_stack.py

starts three voters of its own, pushes, kills the leader with SIGKILL, and goes on; at the end it
restarts the dead one, stops all, starts all, and the stack is as it was. Step by step instead:

    python examples/replicated_stack.py voter --id 1       (and 2, and 3; each in its own shell)
    python examples/replicated_stack.py push a b c
    python examples/replicated_stack.py pop

Both find their cluster file at --config or TREX_CONFIG (`trex init DIR --voters 3 --format`).

Three parts make it: ``Stack`` knows nothing of TRex; ``StackMachine`` says how its calls, and its
whole state, are bytes; ``StackProxy`` is a stack whose methods are commands. The proxy pushes and
pops exactly once, whatever becomes of leaders, and a method that raises, raises at the caller.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import anyio
import msgspec

from dashboard.local import Child, LocalCluster
from trex_core.access import voter_name
from trex_core.cluster import ClusterConfig
from trex_core.credentials import FOLDER
from voters import Driver, Failed, TrexError, open_driver, open_voter, read_cluster

DEADLINE_S: Final = 15.0


class Stack:
    """A stack. It was written before anybody thought of replication."""

    def __init__(self) -> None:
        self.items: list[str] = []

    def push(self, item: str) -> int:
        """Put ``item`` on top; returns the new height."""
        self.items.append(item)
        return len(self.items)

    def pop(self) -> str:
        """Take the top item off. Raises IndexError when there is none."""
        return self.items.pop()

    def peek(self) -> str:
        """The top item. Raises IndexError when there is none."""
        return self.items[-1]

    def height(self) -> int:
        """How many items there are."""
        return len(self.items)


class Push(msgspec.Struct, frozen=True, tag=True):
    """The call ``push(item)``."""

    item: str


class Pop(msgspec.Struct, frozen=True, tag=True):
    """The call ``pop()``."""


class Peek(msgspec.Struct, frozen=True, tag=True):
    """The call ``peek()``."""


class Height(msgspec.Struct, frozen=True, tag=True):
    """The call ``height()``."""


_command: Final[msgspec.json.Decoder[Push | Pop]] = msgspec.json.Decoder(Push | Pop)
_question: Final[msgspec.json.Decoder[Peek | Height]] = msgspec.json.Decoder(Peek | Height)


class StackMachine:
    """A stack as a replicated state machine (``trex_core.machine.Machine``): calls in, results
    out, the same at each voter. An exception becomes the command's result, the stack as before."""

    def __init__(self) -> None:
        self.stack = Stack()

    def apply(self, slot: int, command: bytes) -> bytes:
        """Make one call. ``slot`` could serve as its version; a stack needs none."""
        del slot
        match _command.decode(command):
            case Push(item=item):
                return msgspec.json.encode(self.stack.push(item))
            case Pop():
                return msgspec.json.encode(self.stack.pop())

    def query(self, query: bytes) -> bytes:
        """Make a call that changes nothing."""
        match _question.decode(query):
            case Peek():
                return msgspec.json.encode(self.stack.peek())
            case Height():
                return msgspec.json.encode(self.stack.height())

    def snapshot(self) -> Iterator[bytes]:
        """The whole stack. Encoded here and now: the stack goes on changing."""
        return iter([msgspec.json.encode(self.stack.items)])

    def restore(self, data: bytes) -> None:
        """Put the stack back to a snapshot."""
        self.stack.items = msgspec.json.decode(data, type=list[str])


class StackProxy:
    """The stack that all voters agree on, from anywhere."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def push(self, item: str) -> int:
        """As :meth:`Stack.push`, exactly once."""
        return msgspec.json.decode(await self._call(Push(item)), type=int)

    async def pop(self) -> str:
        """As :meth:`Stack.pop`, exactly once."""
        return msgspec.json.decode(await self._call(Pop()), type=str)

    async def peek(self) -> str:
        """As :meth:`Stack.peek`, of the stack as it is now."""
        answer = await self._driver.query(msgspec.json.encode(Peek()))
        return msgspec.json.decode(answer.body, type=str)

    async def height(self) -> int:
        """As :meth:`Stack.height`, of the stack as it is now."""
        answer = await self._driver.query(msgspec.json.encode(Height()))
        return msgspec.json.decode(answer.body, type=int)

    async def _call(self, call: Push | Pop) -> bytes:
        try:
            return (await self._driver.submit(msgspec.json.encode(call))).body
        except Failed as error:
            if error.detail == IndexError.__name__:
                raise IndexError(f"pop from an empty stack, in slot {error.slot}") from error
            raise


# --- running it ---------------------------------------------------------------------------------


async def run_voter(cluster: ClusterConfig, voter: int, directory: Path, credentials: Path) -> None:
    """One voter, until SIGTERM or Ctrl-C."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_voter(cluster, voter, directory, StackMachine(), credentials=credentials):
            print(f"voter {voter} runs", flush=True)
            async for _ in signals:
                break


async def with_proxy(
    cluster: ClusterConfig, credentials: Path, work: Callable[[StackProxy, Driver], Awaitable[None]]
) -> None:
    """Run ``work`` with the stack of a cluster."""
    async with open_driver(cluster, credentials, deadline_s=DEADLINE_S) as driver:
        await work(StackProxy(driver), driver)


def start_voter(here: LocalCluster, voter: int) -> Child:
    """Start one voter of the story as a process of its own."""
    name = f"voter-{voter}"
    command = [sys.executable, __file__, "voter", "--id", str(voter)]
    child = Child(name, command, here.directory / "logs" / f"{name}.log", here.environment)
    here.children[name] = child
    child.wait_for_line(f"voter {voter} runs", DEADLINE_S)
    return child


def story() -> None:
    """Three voters, a killed leader, a restart of everything: the stack stays what it is."""
    with tempfile.TemporaryDirectory() as place, LocalCluster(Path(place), voters=3) as here:
        cluster, _ = read_cluster(here.config_path)
        for voter in here.voter_ids:
            start_voter(here, voter)

        async def first(stack: StackProxy, driver: Driver) -> None:
            for item in ("bottom", "middle", "top"):
                print(f"push {item}: height {await stack.push(item)}")
            leader = driver.leader
            here.voter(leader).kill()
            print(f"voter {leader}, the leader, was killed")
            print(f"pop: {await stack.pop()}")
            start_voter(here, leader)
            print(f"peek: {await stack.peek()}, height {await stack.height()}")

        async def second(stack: StackProxy, _: Driver) -> None:
            print(f"pop: {await stack.pop()}")
            print(f"pop: {await stack.pop()}")
            try:
                await stack.pop()
            except IndexError as error:
                print(f"pop: IndexError, {error}")

        anyio.run(with_proxy, cluster, here.credentials(), first)
        for voter in here.voter_ids:
            here.voter(voter).kill()
        print("all voters were killed; they start again")
        for voter in here.voter_ids:
            start_voter(here, voter)
        anyio.run(with_proxy, cluster, here.credentials(), second)


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description="A replicated stack. Without a verb: a story.")
    verbs = parser.add_subparsers(dest="verb")
    for verb, text in (
        ("voter", "run one voter"),
        ("push", "push items"),
        ("pop", "pop an item"),
        ("peek", "show the top item"),
    ):
        options = verbs.add_parser(verb, help=text)
        options.add_argument("--config", type=Path, help="the cluster file (default: TREX_CONFIG)")
        if verb == "voter":
            options.add_argument("--id", type=int, required=True)
        if verb == "push":
            options.add_argument("items", nargs="+")
    asked = parser.parse_args()
    if asked.verb is None:
        story()
        return
    cluster, base = read_cluster(asked.config)
    if asked.verb == "voter":
        directory = base / cluster.voter(asked.id).directory
        credentials = base / FOLDER / voter_name(asked.id)
        anyio.run(run_voter, cluster, asked.id, directory, credentials)
        return

    async def work(stack: StackProxy, _: Driver) -> None:
        match asked.verb:
            case "push":
                for item in asked.items:
                    print(await stack.push(item))
            case "pop":
                print(await stack.pop())
            case _:
                print(await stack.peek())

    try:
        anyio.run(with_proxy, cluster, base / FOLDER / "admin", work)
    except (TrexError, IndexError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
