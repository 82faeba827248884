"""PlanetServe: one large language model whose decoder layers are spread over many machines.

The names below are the public interface. They load on first use, so that `import planetserve`
costs nothing; only the client's classes bring torch, transformers and hivemind with them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ORIGIN = {
    "AutoDistributedConfig": "planetserve.client.auto",
    "AutoDistributedModelForCausalLM": "planetserve.client.auto",
    "InferenceSession": "planetserve.client.session",
    "ClientConfig": "planetserve.config",
    "ServerConfig": "planetserve.config",
    "BlockSpan": "planetserve.types",
    "Chain": "planetserve.types",
    "Hop": "planetserve.types",
    "ServerInfo": "planetserve.types",
    "Blame": "planetserve.errors",
    "CacheExhausted": "planetserve.errors",
    "CapacityError": "planetserve.errors",
    "ConfigError": "planetserve.errors",
    "CryptoError": "planetserve.errors",
    "DecryptionFailed": "planetserve.errors",
    "HandshakeFailed": "planetserve.errors",
    "HopTimeout": "planetserve.errors",
    "LocalProtocolError": "planetserve.errors",
    "MissingBlocksError": "planetserve.errors",
    "ModelError": "planetserve.errors",
    "ModelMismatchError": "planetserve.errors",
    "NoChainAvailable": "planetserve.errors",
    "PeerUnreachable": "planetserve.errors",
    "PlanetServeError": "planetserve.errors",
    "QueueFull": "planetserve.errors",
    "RekeyNeeded": "planetserve.errors",
    "RemoteError": "planetserve.errors",
    "RemoteProtocolError": "planetserve.errors",
    "SessionClosed": "planetserve.errors",
    "SessionError": "planetserve.errors",
    "SessionLengthError": "planetserve.errors",
    "StreamClosed": "planetserve.errors",
    "TransportError": "planetserve.errors",
}

if TYPE_CHECKING:
    from planetserve.client.auto import AutoDistributedConfig, AutoDistributedModelForCausalLM
    from planetserve.client.session import InferenceSession
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
        SessionLengthError,
        StreamClosed,
        TransportError,
    )
    from planetserve.types import BlockSpan, Chain, Hop, ServerInfo

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
    "SessionLengthError",
    "StreamClosed",
    "TransportError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _ORIGIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_ORIGIN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
