"""The built-in state machine: members and their ring, configuration, leases.

``commands`` is its vocabulary, ``state`` says what commands do, ``ring`` derives placement from
members, ``ordered`` is the persistent sequence both are built on.
"""
