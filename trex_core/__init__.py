"""TRex, the algorithm: values in, values out.  No I/O, clock, randomness, logging or threads.

The protocol on half a page.  A *slot* holds one value; all voters fix the same value in each slot,
for ever.  A *ballot* (era, round, voter) is used by one voter once.

1. Who hears no leader polls; a promise quorum that hears none either lets it stand.
2. It promises itself a fresh ballot on disk, then sends ``Prepare(ballot, first)`` for every slot
   from its first unfixed one.  Who promised no higher ballot and has none of those slots fixed
   promises, and names the (slot, ballot) pairs it holds.
3. With a promise quorum complete it leads: it re-proposes, slot by slot, the value of the highest
   ballot named (fetched by exactly that pair), no-ops in the holes, and then commands.
4. ``Accept(ballot, first, values)``: who promised no higher ballot journals and answers
   ``Accepted``.  An accept quorum fixes the slot.
5. The leader announces its tip (fixed slot and hash chain).  A follower fixes what it holds at that
   very ballot, or what gives that very chain; otherwise it catches up.

Votes (Prepare, Promise, Accepted) leave only after the records before them are synced.

Rooms: ``messages`` (vocabulary, limits), ``state`` (what a voter remembers; events, effects,
records, replay), ``quorum``, ``paxos`` (``step``), ``invariants`` (checked after every step),
``learner`` (order and repair), ``wire`` (the frame), ``cluster`` (the cluster file), ``sessions``
(exactly once), ``machine`` (what can be replicated), ``snapshot`` (its bytes), ``metadata`` (the
built-in state machine).
"""
