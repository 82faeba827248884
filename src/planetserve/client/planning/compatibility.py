"""Whether a client and a server can talk, by what the server announces."""

from __future__ import annotations

from planetserve.types import ServerInfo
from planetserve.wire.protocols import OLDEST_VERSION, PROTOCOL_VERSION


def obstacle(info: ServerInfo) -> str:
    """What keeps this client from using a server; empty if nothing does."""
    oldest, newest = info.protocol_versions
    if newest < OLDEST_VERSION:
        return f"speaks protocol version {newest} at most, this client {OLDEST_VERSION} at least"
    if oldest > PROTOCOL_VERSION:
        return f"speaks protocol version {oldest} at least, this client {PROTOCOL_VERSION} at most"
    if info.not_understood:
        return f"requires what this client does not know ({', '.join(info.not_understood[:3])})"
    return ""
