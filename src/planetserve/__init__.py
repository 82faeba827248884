"""PlanetServe: one large language model whose decoder layers are spread over many machines.

The names below are the public interface. The client's classes load on first use, because they
bring torch, transformers and hivemind with them; the rest costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from planetserve.config import ClientConfig, ServerConfig
from planetserve.errors import (
    Blame,
    CacheExhausted,
    CapacityError,
    ConfigError,
    CryptoError,
    DecryptionFailed,
    HandshakeFailed,
    HopTimeout,
    LocalProtocolError,
    MissingBlocksError,
    ModelError,
    ModelMismatchError,
    NoChainAvailable,
    PeerUnreachable,
    PlanetServeError,
    QueueFull,
    RekeyNeeded,
    RemoteError,
    RemoteProtocolError,
    SessionClosed,
    SessionError,
    SessionExpired,
    SessionLengthError,
    StreamClosed,
    TransportError,
)
from planetserve.types import BlockSpan, Chain, Hop, ServerInfo

if TYPE_CHECKING:
    from planetserve.client.auto import AutoDistributedConfig, AutoDistributedModelForCausalLM
    from planetserve.client.session import InferenceSession

__version__ = "0.1.0"

__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModelForCausalLM",
    "Blame",
    "BlockSpan",
    "CacheExhausted",
    "CapacityError",
    "Chain",
    "ClientConfig",
    "ConfigError",
    "CryptoError",
    "DecryptionFailed",
    "HandshakeFailed",
    "Hop",
    "HopTimeout",
    "InferenceSession",
    "LocalProtocolError",
    "MissingBlocksError",
    "ModelError",
    "ModelMismatchError",
    "NoChainAvailable",
    "PeerUnreachable",
    "PlanetServeError",
    "QueueFull",
    "RekeyNeeded",
    "RemoteError",
    "RemoteProtocolError",
    "ServerConfig",
    "ServerInfo",
    "SessionClosed",
    "SessionError",
    "SessionExpired",
    "SessionLengthError",
    "StreamClosed",
    "TransportError",
    "__version__",
]

_LAZY = {
    "AutoDistributedConfig": "planetserve.client.auto",
    "AutoDistributedModelForCausalLM": "planetserve.client.auto",
    "InferenceSession": "planetserve.client.session",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
