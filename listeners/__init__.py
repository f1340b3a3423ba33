"""The embeddable follower of a TRex cluster.

Start at :func:`open_listener`, or at :class:`BlockingListener` in a threaded program. ``listener``
holds the state, ``source`` the sockets, ``changes`` what subscribers see, ``store`` the database
(imported only for a listener that keeps one), ``sql`` the queries on it.
"""

from listeners.blocking import BlockingListener
from listeners.changes import CompactedError, Delivery, Lagged, Progress, Reset, SlotChanges
from listeners.listener import (
    DeadlineError,
    Listener,
    ListenerOptions,
    ListenerStatus,
    ListenerStoppedError,
    NoStoreError,
    Observer,
    open_listener,
)

__all__ = [
    "BlockingListener",
    "CompactedError",
    "DeadlineError",
    "Delivery",
    "Lagged",
    "Listener",
    "ListenerOptions",
    "ListenerStatus",
    "ListenerStoppedError",
    "NoStoreError",
    "Observer",
    "Progress",
    "Reset",
    "SlotChanges",
    "open_listener",
]
