"""Voters missing: writes go on with a majority, and fail by their deadline without one."""

from __future__ import annotations

import time

import pytest

from tests.e2e.harness import LocalCluster, all_config, config_of, put
from voters.driver import NoQuorum, OutcomeUnknown, open_driver

DEADLINE_S = 3.0


async def test_writes_go_on_without_two_of_five_and_wait_for_a_third(tmp_path):
    with LocalCluster(tmp_path) as cluster:
        cluster.start_voters()
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=30) as driver:
            acknowledged = {"all": await put(driver, "all", "5 voters")}
            leader = (await driver.find_leader()).voter
            followers = [voter for voter in cluster.voter_ids if voter != leader]

            for voter in followers[:2]:
                cluster.voter(voter).kill()
            for count in range(20):
                acknowledged[f"three/{count}"] = await put(driver, f"three/{count}", "3 voters")

            cluster.voter(followers[2]).kill()
            began = time.monotonic()
            with pytest.raises((NoQuorum, OutcomeUnknown)) as first:
                await put(driver, "two", "2 voters", DEADLINE_S)
            with pytest.raises(NoQuorum, match="surely was not proposed"):
                await put(driver, "two again", "2 voters", DEADLINE_S)
            assert time.monotonic() - began < 2 * DEADLINE_S + 1

            cluster.start_voter(followers[2])
            if isinstance(first.value, OutcomeUnknown):  # proposed before the leader stepped down
                acknowledged["two"] = (await driver.resolve(first.value, 30)).slot
            acknowledged["back"] = await put(driver, "back", "3 voters")
            found = await all_config(driver)
    assert {key: slot for key, (_, slot) in found.items()} == acknowledged
