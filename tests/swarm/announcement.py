"""Something to announce."""

from __future__ import annotations

from typing import Any

from planetserve.crypto.identity import Identity
from planetserve.types import BlockSpan, ServerInfo, ServerState


def make_info(identity: Identity, **fields: Any) -> ServerInfo:
    """A plausible announcement of the identity's owner."""
    values: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "model": "tiny",
        "fingerprint": "f" * 64,
        "span": BlockSpan(0, 4),
        "num_blocks": 8,
        "state": ServerState.ONLINE,
        "dtype": "float32",
        "addresses": (f"/ip4/127.0.0.1/tcp/31337/p2p/{identity.peer_id}",),
        "decode_ms_per_block": 1.5,
        "tokens_per_s_per_block": 900.0,
        "network_bytes_per_s": 1e8,
        "free_cache_tokens": 4096,
        "max_session_tokens": 2048,
    }
    return ServerInfo(**{**values, **fields})
