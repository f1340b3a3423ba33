"""The lease clock never ends a lease before its time, and ends it soon after."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from voters.leases import QUEUE_SLACK, LeaseClock

HEARTBEAT_MS = 80


def clock(**leases: int) -> LeaseClock:
    return LeaseClock(HEARTBEAT_MS, {int(name[1:]): ms for name, ms in leases.items()}, 1000)


def beat(held: LeaseClock, now_ms: int, rounds: int) -> int:
    """Advance in steps of a heartbeat, each with a newer round, up to ``now_ms``."""
    at = now_ms - rounds * HEARTBEAT_MS
    for step in range(1, rounds + 1):
        held.advance(at + step * HEARTBEAT_MS, step)
    return rounds


def test_a_lease_runs_out_after_its_time_of_acknowledged_rounds():
    held = clock(L7=240)
    held.advance(1080, 1)
    held.advance(1160, 2)
    assert held.expire(10) == ()
    assert held.remaining_ms(7) == 80
    held.advance(1240, 3)
    assert held.expire(10) == (7,)


def test_without_a_newer_round_no_time_passes():
    held = clock(L7=100)
    held.advance(1080, 1)
    for now_ms in range(1100, 90_000, 100):
        held.advance(now_ms, 1)
    assert held.expire(10) == ()
    assert held.remaining_ms(7) == 20


def test_a_pause_counts_as_one_heartbeat_at_most():
    held = clock(L7=200)
    held.advance(1080, 1)
    held.advance(3_600_000, 2)
    assert held.remaining_ms(7) == 200 - 2 * HEARTBEAT_MS
    held.advance(3_600_080, 3)
    assert held.expire(10) == (7,)


def test_many_rounds_in_a_heartbeat_count_real_time_only():
    held = clock(L7=100)
    for round_number in range(1, 51):
        held.advance(1000 + round_number, round_number)
    assert held.remaining_ms(7) == 50


def test_a_renewal_gives_the_full_time_again():
    held = clock(L7=200)
    held.advance(1080, 1)
    held.advance(1160, 2)
    assert held.renew((7,), {7: 200}, 1160) == (7,)
    held.advance(1240, 3)
    assert held.remaining_ms(7) == 120
    assert held.expire(10) == ()


def test_what_passed_before_a_renewal_is_not_taken_from_its_time():
    """Between two rounds: the next advance counts the whole time since the one before."""
    held = clock(L7=200)
    held.advance(1080, 1)
    assert held.renew((7,), {7: 200}, 1120) == (7,)
    held.advance(1160, 2)
    assert held.remaining_ms(7) == 200 - 40


def test_only_leases_that_exist_are_renewed_in_the_order_asked():
    held = clock(L1=100, L2=100, L3=100)
    assert held.renew((3, 9, 1), {1: 100, 2: 100, 3: 100}, 1000) == (3, 1)


def test_a_lease_named_often_is_renewed_once_and_renewals_pile_up_nothing():
    held = clock(L1=100, L2=100)
    for now_ms in range(1000, 1080):
        assert held.renew((2, 1, 2) * 300, {1: 100, 2: 100}, now_ms) == (2, 1)
    assert len(held._queue) == 2
    held.advance(1080, 1)
    held.advance(1160, 2)
    assert held.expire(10) == ()
    held.advance(1180, 3)
    assert held.expire(10) == (1, 2)


def test_a_lease_granted_a_moment_ago_can_be_renewed_before_it_is_reconciled():
    held = clock()
    assert held.renew((4,), {4: 500}, 1000) == (4,)
    assert held.remaining_ms(4) == 500


def test_what_is_being_expired_is_renewed_no_more_and_proposed_once():
    held = clock(L7=80)
    held.advance(1080, 1)
    assert held.expire(10) == (7,)
    assert held.expire(10) == ()
    assert held.renew((7,), {7: 80}, 1080) == ()


def test_an_expiry_that_was_not_proposed_is_taken_back():
    held = clock(L7=80, L8=80)
    held.advance(1080, 1)
    assert held.expire(10) == (7, 8)
    held.give_up((7,))
    assert held.renew((7, 8), {7: 80, 8: 80}, 1080) == (7,)
    held.advance(1160, 2)
    assert held.expire(10) == (7,)


def test_an_expiry_taken_back_is_proposed_again_if_nobody_renews():
    held = clock(L7=80)
    held.advance(1080, 1)
    assert held.expire(10) == (7,)
    held.give_up((7,))
    assert held.expire(10) == (7,)


def test_expiries_are_bounded_and_the_earliest_goes_first():
    held = LeaseClock(HEARTBEAT_MS, {lease: 10 + lease for lease in range(1, 50)}, 1000)
    held.advance(1080, 1)
    assert held.expire(3) == (1, 2, 3)
    assert held.expire(3) == (4, 5, 6)


def test_reconciling_forgets_the_ended_and_starts_the_new_full():
    held = clock(L1=100, L2=100)
    held.advance(1080, 1)
    held.reconcile({2: 100, 3: 300}, 1080)
    assert held.remaining_ms(1) is None
    assert held.remaining_ms(2) == 20
    assert held.remaining_ms(3) == 300
    held.advance(1160, 2)
    assert held.expire(10) == (2,)


def test_a_new_leader_gives_every_lease_its_full_time():
    old = clock(L7=100)
    beat(old, 1080, 1)
    assert old.remaining_ms(7) == 20
    new = LeaseClock(HEARTBEAT_MS, {7: 100}, 1080)
    assert new.remaining_ms(7) == 100


@given(
    st.integers(1, 30).map(lambda tens: 10 * tens),
    st.lists(
        st.tuples(st.sampled_from([0, 10, 20, 70, 90, 400]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=40,
    ),
)
@settings(max_examples=500)
def test_never_before_its_time(time_ms: int, steps: list[tuple[int, bool, bool]]):
    """Whatever the weather: from arrival of the last renewal to expiry at least the time to live
    passed in real time."""
    held = LeaseClock(HEARTBEAT_MS, {7: time_ms}, 0)
    now_ms = renewed_ms = rounds = 0
    for passed_ms, acknowledged, renew in steps:
        now_ms += passed_ms
        if renew:
            assert held.renew((7,), {7: time_ms}, now_ms) == (7,)
            renewed_ms = now_ms
        rounds += acknowledged
        held.advance(now_ms, rounds)
        if held.expire(1):
            assert now_ms - renewed_ms >= time_ms
            return


def test_leases_that_end_early_leave_nothing_behind():
    """Each could have stayed for a day in the queue of those that are to run out."""
    day_ms = 24 * 3600 * 1000
    clock = LeaseClock(100, {1: 300}, 0)
    for number in range(100):
        granted = dict.fromkeys(range(1000 * number + 2, 1000 * number + 1002), day_ms)
        clock.reconcile({1: 300, **granted}, 0)
        clock.reconcile({1: 300}, 0)
        assert len(clock._queue) <= 2 * 1001 + QUEUE_SLACK + 1000
    clock.reconcile({1: 300, 2_000_000: 400}, 0)
    for beat in range(1, 5):
        clock.advance(100 * beat, beat)
        assert clock.expire(9) == {3: (1,), 4: (2_000_000,)}.get(beat, ())
        clock.reconcile({1: 300, 2_000_000: 400}, 100 * beat)
    clock.give_up([1])
    assert clock.expire(9) == (1,)
