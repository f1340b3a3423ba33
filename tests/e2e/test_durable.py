"""What was acknowledged is there afterwards, whoever is killed, whenever."""

from __future__ import annotations

import time

import anyio

from tests.e2e.harness import (
    Ledger,
    LocalCluster,
    all_config,
    config_of,
    get,
    kill_all,
    missing,
    put,
    write_for_ever,
)
from trex_core.metadata.commands import (
    ConfigCas,
    Done,
    Reason,
    Rejected,
    decode_result,
    encode_command,
)
from voters.driver import OutcomeUnknown, open_driver

FAILOVER_S_MAX = 2.0


async def test_kill_9_of_all_five_under_load_loses_no_acknowledged_write(tmp_path):
    ledger = Ledger()
    with LocalCluster(tmp_path) as cluster:
        cluster.start_voters()
        config = config_of(cluster)
        for _ in range(2):
            async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
                name = f"boot-{len(ledger.acknowledged)}"
                async with anyio.create_task_group() as group:
                    for writer in range(16):
                        group.start_soon(write_for_ever, driver, ledger, f"{name}/{writer}")
                    await ledger.more(1000, 60)
                    kill_all([cluster.voter(voter) for voter in cluster.voter_ids])
                    group.cancel_scope.cancel()
            cluster.start_voters()
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            found = await all_config(driver)
            assert missing(ledger, found) == {}
            assert await put(driver, "afterwards", "yes") > ledger.slot


async def increment(driver, key):
    """Add one to the number at ``key`` by compare-and-set; the tries it took."""
    tries = 0
    while True:
        tries += 1
        entry = await get(driver, key)
        now, slot = (int(entry.value), entry.slot) if entry else (0, 0)
        try:
            outcome = await driver.submit(encode_command(ConfigCas(key, slot, str(now + 1))))
        except OutcomeUnknown as error:
            outcome = await driver.resolve(error, 60)
        match decode_result(outcome.body):
            case Done():
                return tries
            case Rejected(reason=Reason.CAS_FAILED):
                continue
            case other:
                raise AssertionError(other)


async def test_compare_and_set_increments_are_exact_while_leaders_are_killed(tmp_path):
    kills = 3
    increments = 0
    conflicts = 0
    failovers_s = []

    async def client():
        nonlocal increments, conflicts
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            while not stop.is_set():
                conflicts += await increment(driver, "counter") - 1
                increments += 1
                progressed.set()

    with LocalCluster(tmp_path) as cluster:
        cluster.start_voters()
        config = config_of(cluster)
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            await put(driver, "ready", "yes")
            stop = anyio.Event()
            progressed = anyio.Event()
            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(client)
                for kill in range(kills):
                    progressed = anyio.Event()
                    with anyio.fail_after(20):
                        await progressed.wait()
                    leader = (await driver.find_leader()).voter
                    cluster.voter(leader).kill()
                    began = time.monotonic()
                    await put(driver, f"after-kill-{kill}", "yes")
                    failovers_s.append(time.monotonic() - began)
                    back = cluster.start_voter(leader)
                    # Only then the next: of five, two may be away, and this is about leaders.
                    await anyio.to_thread.run_sync(back.wait_for_line, "voter.archive.ready", 30)
                stop.set()
            counter = await get(driver, "counter")
        print(f"{increments} increments, {conflicts} conflicts, failovers {failovers_s} s")
        assert counter is not None
        assert int(counter.value) == increments
        assert increments > kills
        assert max(failovers_s) <= FAILOVER_S_MAX
