"""PlanetServe: one large language model whose decoder layers are spread over many machines.

The names below are the public interface. The client's classes load on first use, because they
bring torch, transformers and hivemind with them; the rest costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from planetserve.config import ClientConfig, ServerConfig
from planetserve.config.moved_modules import MovedModules
from planetserve.errors import (
    Blame,
    CacheExhausted,
    CapacityError,
    ConfigError,
    CryptoError,
    DecryptionFailed,
    EdgeMismatch,
    EdgeStalled,
    HandshakeFailed,
    HopTimeout,
    LocalProtocolError,
    MissingBlocksError,
    ModelError,
    ModelMismatchError,
    NoChainAvailable,
    PeerReportedError,
    PeerUnreachable,
    PlanetServeError,
    QueueFull,
    ReceiptError,
    ReceiptMissing,
    RefusedByServers,
    RekeyNeeded,
    RemoteError,
    RemoteProtocolError,
    SessionClosed,
    SessionError,
    SessionExpired,
    SessionLengthError,
    StreamClosed,
    TransportError,
    UnsupportedError,
)
from planetserve.types import BlockSpan, Chain, Hop, ServerInfo

if TYPE_CHECKING:
    from planetserve.client.hf.from_pretrained import (
        AutoDistributedConfig,
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
    )
    from planetserve.client.hf.petals_aliases import (
        DistributedBloomConfig,
        DistributedBloomForCausalLM,
        DistributedBloomModel,
        DistributedFalconConfig,
        DistributedFalconForCausalLM,
        DistributedFalconModel,
        DistributedLlamaConfig,
        DistributedLlamaForCausalLM,
        DistributedLlamaModel,
        DistributedMixtralConfig,
        DistributedMixtralForCausalLM,
        DistributedMixtralModel,
    )
    from planetserve.client.session import InferenceSession

__version__ = "0.1.0"

__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModel",
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
    "DistributedBloomConfig",
    "DistributedBloomForCausalLM",
    "DistributedBloomModel",
    "DistributedFalconConfig",
    "DistributedFalconForCausalLM",
    "DistributedFalconModel",
    "DistributedLlamaConfig",
    "DistributedLlamaForCausalLM",
    "DistributedLlamaModel",
    "DistributedMixtralConfig",
    "DistributedMixtralForCausalLM",
    "DistributedMixtralModel",
    "EdgeMismatch",
    "EdgeStalled",
    "HandshakeFailed",
    "Hop",
    "HopTimeout",
    "InferenceSession",
    "LocalProtocolError",
    "MissingBlocksError",
    "ModelError",
    "ModelMismatchError",
    "NoChainAvailable",
    "PeerReportedError",
    "PeerUnreachable",
    "PlanetServeError",
    "QueueFull",
    "ReceiptError",
    "ReceiptMissing",
    "RefusedByServers",
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
    "UnsupportedError",
    "__version__",
]

_LAZY = {
    "AutoDistributedConfig": "planetserve.client.hf.from_pretrained",
    "AutoDistributedModel": "planetserve.client.hf.from_pretrained",
    "AutoDistributedModelForCausalLM": "planetserve.client.hf.from_pretrained",
    "DistributedBloomConfig": "planetserve.client.hf.petals_aliases",
    "DistributedBloomForCausalLM": "planetserve.client.hf.petals_aliases",
    "DistributedBloomModel": "planetserve.client.hf.petals_aliases",
    "DistributedFalconConfig": "planetserve.client.hf.petals_aliases",
    "DistributedFalconForCausalLM": "planetserve.client.hf.petals_aliases",
    "DistributedFalconModel": "planetserve.client.hf.petals_aliases",
    "DistributedLlamaConfig": "planetserve.client.hf.petals_aliases",
    "DistributedLlamaForCausalLM": "planetserve.client.hf.petals_aliases",
    "DistributedLlamaModel": "planetserve.client.hf.petals_aliases",
    "DistributedMixtralConfig": "planetserve.client.hf.petals_aliases",
    "DistributedMixtralForCausalLM": "planetserve.client.hf.petals_aliases",
    "DistributedMixtralModel": "planetserve.client.hf.petals_aliases",
    "InferenceSession": "planetserve.client.session",
}


sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
