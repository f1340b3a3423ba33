"""What one simulated world is like: sizes, clocks, faults and their rates.

This module alone draws the options of a seed (swarm testing: each seed switches on its own subset
of faults, so that one fault cannot mask another). Times are in simulated microseconds.
"""

from __future__ import annotations

from random import Random

import msgspec

TICK_US = 10_000
"""A nominal tick. Each node's own differs by its clock skew."""

FAULTS = (
    "crash",
    "crash_all",
    "pause",
    "split",
    "one_way",
    "hub_only",
    "clog",
    "isolate_leader",
    "deaf_leader",
    "heal_links",
    "hand_over",
    "full_disk",
    "sync_failure",
    "bit_flip",
    "wipe",
    "roll_back",
    "restart_storm",
    "upgrade",
    "restart_listener",
    "cut_listener",
    "archives_down",
    "loss_burst",
)


class Options(msgspec.Struct, frozen=True):
    """One world. Rates are probabilities, ``*_us`` are microseconds of simulated time."""

    voters: int = 3
    listeners: int = 1
    clients: int = 2
    tenants: int = 0
    """Clients that compete for leased names."""
    events: int = 2_000
    """Events of the safety phase; the liveness phase comes on top."""
    heartbeat_ticks: int = 1
    election_ticks_min: int = 4
    election_ticks_max: int = 10
    retry_ticks: int = 2
    skew: float = 0.0
    """Each node's tick is drawn from 1 - skew .. 1 + skew nominal ticks."""
    delay_min_us: int = 200
    delay_span_us: int = 1_500
    slow: float = 0.0
    """Share of datagrams that take up to ``slow_us`` instead: reordering across elections."""
    slow_us: int = 120_000
    loss: float = 0.0
    duplication: float = 0.0
    corruption: float = 0.0
    stream_loss: float = 0.0
    connection_failure: float = 0.0
    sync_min_us: int = 200
    sync_span_us: int = 2_000
    fixed_held_us: int = 0
    """How long records of what is fixed wait for a vote whose sync takes them along."""
    boundary_crash: float = 0.0
    """Chance of a crash at an effect boundary, per step that has effects."""
    torn: float = 0.5
    """At a crash: chance that a part of the unsynced bytes reached the disk."""
    fault_every_us: int = 60_000
    """Mean time between faults of ``faults``."""
    faults: tuple[str, ...] = ()
    downtime_us: int = 80_000
    submit_every_us: int = 12_000
    burst: int = 3
    """Most commands a client sends at once."""
    in_flight: int = 6
    """Most unanswered commands of one client."""
    reads: float = 0.2
    """Chance of a linearizable read each time a client sends."""
    large: float = 0.0
    """Share of commands of several datagrams."""
    large_bytes: int = 4_000
    levels: float = 0.0
    """Share of commands of a newer feature level, once a majority of the voters knows it."""
    silence_ms: int = 1_000
    """After how long a listener takes a silent stream for dead, in tenths of its ticks."""
    retry_ms: int = 50
    """A listener's first pause after a catch-up that failed."""
    snapshot_slots: int = 0
    """A snapshot is cut at multiples of this; 0: never."""
    segment_bytes: int = 1 << 14
    small_limits: bool = False
    """Windows, parts and chain checks of a few slots (``mutants.SMALL_LIMITS``)."""
    calm_us: int = 150_000
    """No fault before this time, so that most worlds get over their first election."""
    loss_after: float = 0.0
    """Share of datagrams still lost in the liveness phase."""
    heal_all: bool = True
    """Whether the liveness phase heals everything, or a quorum only: the rest stays broken."""


def draw(seed: int, events: int = 2_000) -> Options:
    """The options of ``seed``."""
    rng = Random(f"options {seed}")

    def some(chance: float, most: float) -> float:
        return round(rng.random() * most, 4) if rng.random() < chance else 0.0

    heartbeat = rng.choice((1, 1, 2))
    election_min = heartbeat * rng.choice((3, 4, 5))
    share = rng.choice((0.2, 0.4, 0.6))
    faults = tuple(fault for fault in FAULTS if rng.random() < share)
    levels = round(rng.random(), 4) if "upgrade" in faults else 0.0
    return Options(
        voters=rng.choice((3, 3, 3, 3, 3, 3, 5, 5, 5, 5, 7, 1)),
        listeners=rng.choice((0, 1, 2, 4)),
        clients=rng.choice((1, 2, 3)),
        tenants=rng.choice((0, 0, 2, 3)),
        events=events,
        heartbeat_ticks=heartbeat,
        election_ticks_min=election_min,
        election_ticks_max=election_min + rng.choice((2, 6, 12)),
        retry_ticks=rng.choice((1, 2, 4)),
        skew=some(0.6, 0.4),
        delay_min_us=rng.choice((50, 200, 1_000)),
        delay_span_us=rng.choice((100, 1_500, 6_000, 20_000)),
        slow=some(0.5, 0.1),
        slow_us=rng.choice((30_000, 120_000, 400_000)),
        loss=some(0.7, 0.3),
        duplication=some(0.6, 0.5),
        corruption=some(0.3, 0.02),
        stream_loss=some(0.7, 0.3),
        connection_failure=some(0.5, 0.3),
        sync_min_us=rng.choice((50, 300, 2_000)),
        sync_span_us=rng.choice((100, 2_000, 15_000)),
        boundary_crash=some(0.6, 0.02),
        torn=rng.choice((0.0, 0.5, 1.0)),
        fault_every_us=rng.choice((30_000, 80_000, 200_000)),
        faults=faults,
        downtime_us=rng.choice((5_000, 60_000, 250_000)),
        submit_every_us=rng.choice((4_000, 10_000, 25_000)),
        burst=rng.choice((1, 3, 8)),
        in_flight=rng.choice((1, 6, 24)),
        reads=rng.choice((0.0, 0.2, 0.5)),
        large=some(0.3, 0.2),
        large_bytes=rng.choice((2_000, 8_000, 30_000)),
        levels=levels,
        silence_ms=rng.choice((60, 200, 1_000)),
        retry_ms=rng.choice((10, 50)),
        snapshot_slots=rng.choice((0, 8, 16, 32)),
        segment_bytes=rng.choice((2_000, 6_000, 1 << 16)),
        small_limits=rng.random() < 0.4,
        calm_us=rng.choice((0, 60_000, 150_000, 150_000)),
        loss_after=rng.choice((0.0, 0.0, 0.05, 0.15)),
        heal_all=rng.random() < 0.6,
        fixed_held_us=rng.choice((0, 0, 20_000, 60_000)),
    )


SWITCHES = (
    "tenants",
    "skew",
    "slow",
    "loss",
    "duplication",
    "corruption",
    "stream_loss",
    "connection_failure",
    "fixed_held_us",
    "boundary_crash",
    "torn",
    "reads",
    "large",
    "levels",
    "snapshot_slots",
    "small_limits",
    "loss_after",
    "heal_all",
)
"""Options that are on in some worlds and off in others, beside the faults."""


def switched_on(options: Options) -> list[str]:
    """What ``options`` switch on: options by name, faults, and what is worth counting."""
    on = [f"on_{name}" for name in SWITCHES if getattr(options, name)]
    on.extend(f"on_fault_{fault}" for fault in options.faults)
    on.append(f"on_{options.voters}_voters")
    on.append(f"on_{options.listeners}_listeners")
    if not options.heal_all:
        on.append("on_heal_quorum_only")
    if options.sync_span_us > TICK_US:
        on.append("on_slow_disks")
    return on
