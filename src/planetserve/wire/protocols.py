"""What both ends must agree on: the version of the protocol, its optional parts, names of streams.

docs/protocol.md says how the protocol grows: when a field is enough, when a capability, when a
version.
"""

PROTOCOL_VERSION = 1
"""Version of the protocol, and of the layout of a frame's header."""

OLDEST_VERSION = 1
"""Oldest version that this node still speaks."""

CAPABILITIES: frozenset[str] = frozenset()
"""Optional parts of the protocol that every node of this version knows.

A server announces them, a client names in OPEN those that both of them know, and what belongs to
one is sent only in a session whose OPEN names it.
"""

RECEIPTS = "receipts"
"""Capability: hops sign receipts of what has crossed their edges (`verification/receipt.py`). Who
knows it is a setting: nodes from before capabilities refuse records that name one.
"""

SESSION_PROTOCOL = "planetserve/1/session"
"""Client -> hop: OPEN, then STEP frames in (first hop) and out (last hop), ERROR and CLOSE."""

PUSH_PROTOCOL = "planetserve/1/push"
"""Hop -> next hop: HELLO, then STEP frames."""
