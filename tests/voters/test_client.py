"""The driver and the metadata client over real TCP to scripted voters."""

from __future__ import annotations

import threading
import time

import anyio
import pytest

from tests.credentials import folder
from tests.voters.fake_gateway import CLUSTER_ID, Do, FakeCluster
from trex_core.messages import (
    COMMAND_BYTES_MAX,
    RENEW_LEASES_MAX,
    Answer,
    Kind,
    OutcomeStatus,
    Refusal,
    RefusalReason,
    SessionQuery,
    StatusRequest,
)
from trex_core.metadata.commands import ConfigPut, encode_command
from trex_core.wire import Channel, Identity, encode_body, frame
from voters.client import (
    Compacted,
    Failed,
    Fenced,
    NoQuorum,
    OutcomeUnknown,
    Rejected,
    TooLarge,
    Unavailable,
    connect,
    connect_blocking,
    open_driver,
)
from voters.driver import Driver, _Link, _LinkLost

pytestmark = pytest.mark.anyio


def put(key: str) -> bytes:
    return encode_command(ConfigPut(key, key))


async def submit_all(driver: Driver, keys: list[str]) -> list[int]:
    """Submit puts of ``keys`` at once; the slots of their outcomes, in the order of ``keys``."""
    tickets = [await driver.begin(put(key)) for key in keys]
    return [(await driver.finish(ticket)).slot for ticket in tickets]


async def test_finds_the_leader_whoever_it_is():
    async with FakeCluster(5) as fake:
        for leader in (1, 3, 5):
            fake.leader = leader
            async with connect(fake.config, folder(fake.config)) as client:
                slot = (await client.put("k", "v")).slot
                entry = await client.get("k")
            assert entry is not None and (entry.value, entry.slot) == ("v", slot)
            assert {voter for voter, _ in fake.seen} == {leader}, "nothing is proposed to find out"
            fake.seen.clear()


async def test_pipelines_in_order_and_closes_its_session():
    async with FakeCluster() as fake:
        async with open_driver(fake.config, folder(fake.config)) as driver:
            slots = await submit_all(driver, [str(n) for n in range(1000)])
        assert slots == list(range(2, 1002))
        assert [s.sequence for s in fake.commands()] == list(range(1, 1001))
        assert fake.log[-1].kind == Kind.CLOSE and len(fake.sessions.open) == 0


async def test_a_client_that_stood_still_asks_before_it_calls_the_leader_silent():
    async with (
        FakeCluster() as fake,
        open_driver(fake.config, folder(fake.config)) as driver,
    ):
        await driver.submit(put("first"))
        ticket = await driver.begin(put("second"))
        while driver._pipeline.unsent:
            await anyio.lowlevel.checkpoint()
        assert len(fake.seen) == 2, "it is on its way"
        time.sleep(1.5 * driver._silence_s)  # noqa: ASYNC251 - the whole process stands still
        await driver.finish(ticket)
        assert [submit.sequence for _, submit in fake.seen] == [0, 1, 2], "nothing was sent again"


@pytest.mark.parametrize("busy_s", [0.2, 0.4])
async def test_a_client_that_is_always_late_leaves_a_mute_leader_for_the_next(busy_s):
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await driver.submit(put("first"))
        fake.silent, fake.leader = {1}, 2
        ticket = await driver.begin(put("second"))
        time.sleep(2 * driver._silence_s)  # noqa: ASYNC251 - and before it is sent
        with anyio.fail_after(20 * driver._silence_s):
            while not ticket.done.is_set():
                time.sleep(busy_s)  # noqa: ASYNC251 - no timer is on time
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
        assert driver.leader == 2
        assert (await driver.finish(ticket)).status == OutcomeStatus.APPLIED


@pytest.mark.parametrize("share", [0.2, 0.8])
async def test_who_asks_with_short_deadlines_leaves_a_mute_leader(share):
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await driver.submit(put("first"))
        fake.silent, fake.leader = {1}, 2
        with anyio.fail_after(20 * driver._silence_s):
            while True:
                try:
                    assert await driver.next_sequence(1, deadline_s=share * driver._silence_s) == 2
                except (NoQuorum, Unavailable):
                    continue
                break
        assert driver.leader == 2


async def test_at_most_so_many_commands_are_under_way():
    async with (
        FakeCluster() as fake,
        open_driver(fake.config, folder(fake.config), in_flight_max=8) as driver,
    ):
        fake.script = lambda _voter, _submit: Do.MUTE
        fake.script = lambda _, s: Do.APPLY if s.kind == Kind.OPEN else Do.MUTE
        tickets = [await driver.begin(put(str(n))) for n in range(8)]
        await fake.until(lambda: len(fake.seen) == 9)
        with pytest.raises(NoQuorum):
            await driver.begin(b"one more", deadline_s=0.05)
        assert len(fake.seen) == 9
        fake.script = lambda _voter, _submit: Do.APPLY
        fake.cut(1)
        for ticket in tickets:
            await driver.finish(ticket)
        await driver.submit(put("now there is room"))


async def test_follows_the_leader_and_nothing_is_done_twice():
    async with FakeCluster() as fake:
        async with open_driver(fake.config, folder(fake.config)) as driver:
            await driver.submit(put("first"))
            lost = {4: Do.APPLY_MUTE, 5: Do.MUTE, 6: Do.APPLY_CUT}

            def script(_: int, submit) -> str:
                action = lost.pop(submit.sequence, Do.APPLY)
                if action == Do.APPLY_CUT:
                    fake.leader = 2
                return action

            fake.script = script
            await submit_all(driver, [str(n) for n in range(2, 20)])
        keys = fake.machine.state.config
        assert len(keys) == 19
        order = sorted((entry.slot, key) for key, entry in keys.items())
        assert [key for _, key in order][1:] == [str(n) for n in range(2, 20)]
        assert {voter for voter, _ in fake.seen} == {1, 2}


@pytest.mark.parametrize(
    "reason",
    [
        RefusalReason.BUSY,
        RefusalReason.DISK_FULL,
        RefusalReason.NO_QUORUM,
        RefusalReason.NOT_LEADER,
        RefusalReason.LEADERSHIP_LOST,
    ],
)
async def test_a_refused_command_is_sent_again_in_order(reason):
    async with FakeCluster() as fake:
        async with open_driver(fake.config, folder(fake.config)) as driver:
            await driver.submit(put("first"))
            times = [3]

            def script(_: int, submit) -> str | int:
                if submit.sequence == 4 and times[0]:
                    times[0] -= 1
                    return reason
                return Do.APPLY

            fake.script = script
            await submit_all(driver, [str(n) for n in range(2, 40)])
        order = sorted((e.slot, key) for key, e in fake.machine.state.config.items())
        assert [key for _, key in order][1:] == [str(n) for n in range(2, 40)]


async def test_the_dead_leader_is_left_for_the_next():
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await driver.submit(put("a"))
        await fake.stop(1)
        with anyio.move_on_after(5) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(driver.submit, put("b"))
                fake.leader = 3
        assert not scope.cancelled_caught
        assert driver.leader == 3


async def test_a_silent_leader_is_left_for_the_next():
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await driver.submit(put("a"))
        fake.silent = {1}
        async with anyio.create_task_group() as group:
            group.start_soon(driver.submit, put("b"))
            fake.leader = 2
        assert driver.leader == 2


async def test_a_slow_leader_is_asked_and_kept():
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await driver.submit(put("a"))
        fake.script = lambda _voter, _submit: Do.MUTE
        with pytest.raises(OutcomeUnknown) as caught:
            await driver.submit(put("b"), deadline_s=1.2)
        assert len(fake.seen) == 3, "it answered the status, so nothing was sent again"
        fake.script = lambda _voter, _submit: Do.APPLY
        fake.cut(1)
        assert (await driver.resolve(caught.value)).slot == 3


async def test_nobody_there_is_unavailable():
    async with FakeCluster() as fake:
        config = fake.config
    async with open_driver(config, folder(config), deadline_s=0.3) as driver:
        with pytest.raises(Unavailable, match="no voter could be reached") as caught:
            await driver.submit(put("a"))
        assert caught.value.retry_safe
        with pytest.raises(Unavailable):
            await driver.query(b"?")
        with pytest.raises(Unavailable, match=r"voter 2 at 127\.0\.0\.1"):
            await driver.status(2)


async def test_voters_without_a_leader_are_no_quorum():
    async with FakeCluster() as fake:
        fake.leader = 0
        async with open_driver(fake.config, folder(fake.config), deadline_s=0.3) as driver:
            with pytest.raises(NoQuorum, match="surely was not proposed") as caught:
                await driver.submit(put("a"))
            assert caught.value.retry_safe
            with pytest.raises(NoQuorum):
                await driver.query(b"?")
            with pytest.raises(NoQuorum):
                await driver.find_leader()
            fake.leader = 2
            assert (await driver.submit(put("b"))).slot == 2
        assert [s.command for s in fake.commands()] == [put("b")]


async def test_refusals_that_trickle_in_stop_nothing_else():
    """Each is a reason to pause, but not to prolong a pause: what it refuses was sent before."""
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await driver.submit(put("first"))
        asked, answer, voter = [], fake._answer, Identity(CLUSTER_ID, sender=1)
        over, late = anyio.Event(), 0

        def answered(number, request):
            if isinstance(request, SessionQuery):
                asked.append(request.id)
                return None
            return answer(number, request)

        async def refuse():
            for each in asked[:]:
                reply = Refusal(each, RefusalReason.BUSY, 1, "late")
                for writer in fake._writers[1]:
                    writer.write(frame(voter, Channel.CLIENT, encode_body(reply)))
                await anyio.sleep(0.01)
            over.set()

        fake._answer = answered
        async with anyio.create_task_group() as group:
            for _ in range(150):
                group.start_soon(driver.next_sequence, 1)
            await fake.until(lambda: len(asked) == 150)
            group.start_soon(refuse)
            while not over.is_set():
                try:
                    await driver.submit(put("k"), deadline_s=0.6)
                except NoQuorum:
                    late += 1
                await anyio.sleep(0.01)  # so many a second, at most
            group.cancel_scope.cancel()
        assert late == 0


async def test_what_nobody_waits_for_any_more_is_forgotten():
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:

        async def given_up():
            for _ in range(20):
                with pytest.raises((NoQuorum, Unavailable)):
                    await driver.renew((1,), deadline_s=0.02)

        await driver.submit(put("first"))
        fake.alive = lambda _: None
        await given_up()
        assert len(fake.renewals) > 0
        assert not driver._asked, "sent, and not answered"
        fake.leader = 0
        fake.cut(1)
        ticket = await driver.begin(put("waits for a leader"))
        await given_up()
        with anyio.fail_after(20 * driver._silence_s):
            while driver._asks:  # not sent
                await anyio.lowlevel.checkpoint()
        fake.leader = 1
        await driver.finish(ticket)


async def test_a_read_that_is_answered_ends_the_growth_of_pauses():
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await driver.submit(put("first"))
        calm_s = driver._backoff_s
        fake.refuse_reads = RefusalReason.BUSY
        with pytest.raises(NoQuorum):
            await driver.next_sequence(2, deadline_s=0.2)
        assert driver._backoff_s > calm_s
        fake.refuse_reads = 0
        await driver.next_sequence(2)
        assert driver._backoff_s == calm_s


async def test_given_up_after_refusals_it_is_filled_and_later_ones_go_on():
    async with FakeCluster() as fake:
        async with open_driver(fake.config, folder(fake.config)) as driver:
            await driver.submit(put("a"))
            fake.script = lambda _, s: RefusalReason.BUSY if s.kind == Kind.COMMAND else Do.APPLY
            with pytest.raises(NoQuorum):
                await driver.submit(put("b"), deadline_s=0.1)
            fake.script = lambda _voter, _submit: Do.APPLY
            await driver.submit(put("c"))
        assert [s.command for s in fake.commands()] == [put("a"), put("c")]
        assert [s.sequence for s in fake.log if s.kind == Kind.SKIP] == [2]


async def test_an_unknown_outcome_is_resolved_with_its_first_result():
    async with FakeCluster() as fake, connect(fake.config, folder(fake.config)) as client:
        await client.put("a", "1")
        fake.script = lambda _voter, _submit: Do.APPLY_MUTE
        with pytest.raises(OutcomeUnknown) as caught:
            await client.put("a", "2", deadline_s=0.1)
        assert not caught.value.retry_safe
        with pytest.raises(OutcomeUnknown):
            await client.resolve(caught.value, deadline_s=0.05)
        fake.script = lambda _voter, _submit: Do.APPLY
        fake.leader = 3
        fake.cut(1)
        assert (await client.resolve(caught.value)).slot == 3
        assert (await client.resolve(caught.value)).slot == 3, "as often as one likes"
        entry = await client.get("a")
        assert entry is not None and (entry.value, entry.slot) == ("2", 3)


async def test_a_cancelled_command_that_was_sent_does_not_block_later_ones():
    async with FakeCluster() as fake:
        async with open_driver(fake.config, folder(fake.config), in_flight_max=2) as driver:
            await driver.submit(put("a"))
            fake.script = lambda _voter, _submit: Do.MUTE
            async with anyio.create_task_group() as group:
                group.start_soon(driver.submit, put("b"))
                await fake.until(lambda: len(fake.seen) == 3)
                group.cancel_scope.cancel()
            fake.script = lambda _voter, _submit: Do.APPLY
            fake.cut(1)
            await driver.submit(put("c"))
        assert [s.command for s in fake.commands()] == [put("a"), put("b"), put("c")]


async def test_an_expired_session_is_replaced_unseen_for_a_fresh_command():
    async with FakeCluster() as fake:
        async with open_driver(fake.config, folder(fake.config)) as driver:
            await driver.submit(put("a"))
            fake.expire_sessions()
            await submit_all(driver, ["b", "c", "d"])
        assert sorted(fake.machine.state.config) == ["a", "b", "c", "d"]
        order = sorted((e.slot, key) for key, e in fake.machine.state.config.items())
        assert [key for _, key in order] == ["a", "b", "c", "d"]


async def test_an_expired_session_makes_a_retried_command_unknown_for_ever():
    async with FakeCluster() as fake:
        async with open_driver(fake.config, folder(fake.config)) as driver:
            await driver.submit(put("a"))

            def script(_: int, submit) -> str:
                if submit.kind == Kind.COMMAND and submit.sequence == 2:
                    fake.apply(submit)
                    fake.expire_sessions()
                    fake.script = lambda _voter, _submit: Do.APPLY
                    return Do.CUT
                return Do.APPLY

            fake.script = script
            with pytest.raises(OutcomeUnknown, match="expired") as caught:
                await driver.submit(put("b"))
            with pytest.raises(OutcomeUnknown):
                await driver.resolve(caught.value)
            await driver.submit(put("c"))
        assert [s.command for s in fake.commands()].count(put("b")) == 2
        assert fake.machine.state.config["c"].slot > fake.machine.state.config["b"].slot


async def test_leaving_the_driver_ends_everything_that_waits():
    async with FakeCluster() as fake:
        fake.script = lambda _, s: Do.APPLY if s.kind == Kind.OPEN else Do.MUTE
        async with open_driver(fake.config, folder(fake.config)) as driver:
            ticket = await driver.begin(put("a"))
            await fake.until(lambda: len(fake.seen) == 2)
        with pytest.raises(OutcomeUnknown):
            await driver.finish(ticket)
        with pytest.raises(Unavailable, match="closed"):
            await driver.submit(put("b"))


async def test_what_the_block_raises_leaves_it_as_it_is():
    async with FakeCluster() as fake:
        with pytest.raises(KeyError):  # noqa: PT012 - from inside the block
            async with connect(fake.config, folder(fake.config)) as client:
                await client.put("a", "b")
                raise KeyError("mine")
        with pytest.raises(Rejected) as caught:
            async with connect(fake.config, folder(fake.config)) as client:
                await client.delete("nothing")
        assert caught.value.reason == "not_found"


async def test_too_large_is_told_at_the_client():
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        with pytest.raises(TooLarge, match=str(COMMAND_BYTES_MAX)):
            await driver.submit(bytes(COMMAND_BYTES_MAX + 1))
        assert fake.seen == []
        await driver.submit(put("x" * (COMMAND_BYTES_MAX // 4)))


async def test_failed_refused_and_forgotten_have_their_names(monkeypatch):
    async with FakeCluster() as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await driver.submit(put("a"))
        real = fake.apply
        for status, error in ((OutcomeStatus.FAILED, Failed), (OutcomeStatus.FORGOTTEN, Compacted)):

            def changed(submit, status=status):
                outcome = real(submit)
                return type(outcome)(outcome.id, outcome.slot, status, b"IndexError")

            monkeypatch.setattr(fake, "apply", changed)
            with pytest.raises(error):
                await driver.submit(put("b"))
        monkeypatch.setattr(fake, "apply", real)
        fake.script = lambda _, s: RefusalReason.MALFORMED if s.kind == Kind.COMMAND else Do.APPLY
        with pytest.raises(Rejected, match="scripted"):
            await driver.submit(put("c"))
        fake.script = lambda _voter, _submit: Do.APPLY
        await driver.submit(put("d"))


async def test_reads_follow_the_leader_too_and_local_ones_ask_anybody():
    async with FakeCluster() as fake, connect(fake.config, folder(fake.config)) as client:
        await client.put("a", "1")
        fake.leader = 2
        fake.cut(1)
        assert await client.get("a") is not None
        fake.leader = 0
        entry = await client.get("a", linearizable=False)
        assert entry is not None
        with pytest.raises(NoQuorum):
            await client.get("a", deadline_s=0.2)


async def test_metadata_verbs():
    async with FakeCluster() as fake, connect(fake.config, folder(fake.config)) as client:
        first = await client.cas("k", 0, "1")
        with pytest.raises(Rejected) as caught:
            await client.cas("k", 0, "2")
        assert (caught.value.reason, caught.value.slot) == ("cas_failed", first.slot)
        await client.cas("k", first.slot, None)
        assert await client.get("k") is None
        for number in range(2500):
            await client.driver.begin(put(f"list/{number:04}"))
        listed = await client.list("list/")
        assert [entry.key for entry in listed] == [f"list/{n:04}" for n in range(2500)]

        lease = await client.grant(10_000)
        await client.join("m1", address="a:1", zone="z", attributes={"x": ""}, lease=lease.slot)
        await client.update("m1", state="draining")
        member = await client.member("m1")
        assert member is not None and member.state == "draining" and member.attributes == {"x": ""}
        await client.join("m2")
        assert (await client.owner("key")).replicas == ("m2",)
        assert [m.id for m in await client.members()] == ["m1", "m2"]
        assert [each.id for each in await client.leases()] == [lease.slot]
        await client.revoke(lease.slot)
        assert [m.id for m in await client.members()] == ["m2"]
        await client.leave("m2")
        with pytest.raises(Rejected):
            await client.leave("m2")


async def test_administration():
    async with FakeCluster(5) as fake, open_driver(fake.config, folder(fake.config)) as driver:
        await fake.stop(4)
        found = await driver.statuses(1.0)
        assert list(found) == [1, 2, 3, 4, 5] and isinstance(found[4], Unavailable)
        assert await driver.hand_over(3) == 3 == fake.leader
        assert await driver.hand_over(3) == 3
        await driver.submit(put("a"))
        assert await driver.snapshot_now(2) == fake.slot
        session = await driver.open_session()
        assert await driver.next_sequence(session) == 1
        await driver.close_session(session)
        assert await driver.next_sequence(session) == 0


# --- leases ---------------------------------------------------------------------------------


async def test_one_renewal_covers_all_leases_of_a_client():
    async with FakeCluster() as fake, connect(fake.config, folder(fake.config)) as client:
        async with client.lease(2000) as one, client.lease(1500) as two:
            await fake.until(lambda: (one.id, two.id) in fake.renewals)
            assert one.ensure() == one.id and two.held
        assert len(fake.machine.state.leases) == 0


async def test_more_leases_than_one_request_may_name_are_renewed_in_several():
    many = tuple(range(1, RENEW_LEASES_MAX + 3))
    async with FakeCluster() as fake, connect(fake.config, folder(fake.config)) as client:
        fake.alive = lambda leases: leases[1:]
        assert await client.renew(many + many) == many[1:RENEW_LEASES_MAX] + many[-1:]
        assert fake.renewals == [many[:RENEW_LEASES_MAX], many[RENEW_LEASES_MAX:]]


async def test_a_lease_the_cluster_dropped_is_lost_at_once():
    async with FakeCluster() as fake, connect(fake.config, folder(fake.config)) as client:
        await client.put("a", "b")
        async with client.lease(1500) as lease:
            fake.alive = lambda _: ()
            await lease.lost.wait()
            with pytest.raises(Fenced):
                lease.ensure()


async def test_a_lease_nobody_renews_is_lost_before_its_time():
    async with FakeCluster() as fake, connect(fake.config, folder(fake.config)) as client:
        fake.alive = lambda _: None
        began = anyio.current_time()
        async with client.lease(1000) as lease:
            await lease.lost.wait()
            held_s = anyio.current_time() - began
            assert not lease.held
        margin_s = fake.config.timing.lease_drift_ms / 1000
        assert held_s <= 1.0 - margin_s + 0.3, "lost a drift margin early (and a busy machine)"


async def test_a_lease_shorter_than_the_drift_is_refused():
    async with FakeCluster() as fake, connect(fake.config, folder(fake.config)) as client:
        with pytest.raises(ValueError, match="lease_drift_ms"):
            async with client.lease(400):
                pytest.fail("it could never be relied on")


# --- threads --------------------------------------------------------------------------------


async def test_the_blocking_client_serves_threads_and_leaves_none():
    async with FakeCluster() as fake:
        before = threading.active_count()

        def work() -> tuple[int, int]:
            with connect_blocking(fake.config, folder(fake.config)) as client:
                threads = [
                    threading.Thread(target=client.put, args=(f"k{n}", "v")) for n in range(8)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                with client.lease(5000) as lease:
                    assert lease.ensure() == lease.id
                with pytest.raises(Rejected):
                    client.delete("nothing")
                return len(client.list()), client.members().slot

        count, slot = await anyio.to_thread.run_sync(work)
        assert count == 8 and slot > 8
        assert threading.active_count() <= before + 1, "the worker of this test itself"


async def test_garbage_from_a_voter_is_survived():
    async with FakeCluster() as fake:
        garbage = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = garbage.extra(anyio.abc.SocketAttribute.local_port)

        async def rubbish(stream) -> None:
            async with stream:
                await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)

        async with garbage, anyio.create_task_group() as group:
            group.start_soon(garbage.serve, rubbish)
            await fake.stop(1)
            fake._ports[1] = port
            fake.leader = 2
            async with open_driver(fake.config, folder(fake.config)) as driver:
                for _ in range(5):
                    await driver.submit(put("a"))
                with pytest.raises(Unavailable, match="does not speak"):
                    await driver.status(1)
            group.cancel_scope.cancel()


class Wire:
    """What a link writes to, without a network."""

    def __init__(self, link):
        self.written = []
        self.aborted = False
        link.connection_made(self)

    def write(self, data):
        self.written.append(data)

    def abort(self):
        self.aborted = True


async def test_part_of_a_reply_is_a_sign_of_life_and_silence_is_none():
    link = _Link(CLUSTER_ID)
    Wire(link)
    page = Answer(7, 3, b"x" * 1000)
    data = frame(Identity(CLUSTER_ID), Channel.CLIENT, encode_body(page))
    link.data_received(data[:500])
    assert await link.receive(0.0) is None, "nothing came since it was asked"
    async with anyio.create_task_group() as group:
        heard = []

        async def hear() -> None:
            heard.append(await link.receive())
            heard.append(await link.receive())

        group.start_soon(hear)
        await anyio.wait_all_tasks_blocked()
        link.data_received(data[500:700])
        await anyio.wait_all_tasks_blocked()
        assert heard == [[]]
        link.data_received(data[700:] + data)
    assert heard == [[], [page, page]]


async def test_a_link_whose_other_end_does_not_read_sends_no_more_until_it_does():
    link = _Link(CLUSTER_ID)
    wire = Wire(link)
    await link.send([StatusRequest(1), StatusRequest(2)])
    assert len(wire.written) == 1, "what is sent at once is one write"
    link.pause_writing()
    async with anyio.create_task_group() as group:
        group.start_soon(link.send, [StatusRequest(3)])
        await anyio.wait_all_tasks_blocked()
        assert len(wire.written) == 1
        link.resume_writing()
    assert len(wire.written) == 2


async def test_a_link_that_is_lost_lets_both_sides_know_and_gives_what_it_heard_before():
    link = _Link(CLUSTER_ID)
    wire = Wire(link)
    link.pause_writing()
    last = Answer(7, 3, b"")
    lost = []

    async def send() -> None:
        with pytest.raises(_LinkLost, match="closed the connection"):
            await link.send([StatusRequest(1)])
        lost.append("send")

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        await anyio.wait_all_tasks_blocked()
        link.data_received(frame(Identity(CLUSTER_ID), Channel.CLIENT, encode_body(last)))
        link.connection_lost(None)
    assert lost == ["send"] and wire.written == []
    assert await link.receive() == [last]
    with pytest.raises(_LinkLost, match="closed the connection"):
        await link.receive()


async def test_a_link_that_speaks_of_something_else_is_cut():
    link = _Link(CLUSTER_ID)
    wire = Wire(link)
    link.data_received(frame(Identity(bytes(16)), Channel.CLIENT, b""))
    assert wire.aborted
    with pytest.raises(_LinkLost, match="does not speak for this cluster"):
        await link.receive()
