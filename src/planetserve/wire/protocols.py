"""Names of the stream protocols, in one place because both ends of a stream must agree on them."""

SESSION_PROTOCOL = "planetserve/1/session"
"""Client -> hop: OPEN, then STEP frames in (first hop) and out (last hop), ERROR and CLOSE."""

PUSH_PROTOCOL = "planetserve/1/push"
"""Hop -> next hop: HELLO, then STEP frames."""
