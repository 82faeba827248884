"""Torch tensors to and from the raw bytes of a STEP payload.

bfloat16 travels as bfloat16. Nothing is copied on the way out when the tensor is contiguous on the
CPU, and nothing on the way in: the tensor is a view of the received buffer.
"""

from __future__ import annotations

import math

import torch

from planetserve.errors import ConfigError, RemoteProtocolError
from planetserve.types import DTYPE_NAMES
from planetserve.wire.frame import WireDtype

_BY_NAME: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
_TO_WIRE = {dtype: WireDtype[name.upper()] for name, dtype in _BY_NAME.items()}
_FROM_WIRE = {wire: dtype for dtype, wire in _TO_WIRE.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`, and so on for every dtype that can be served.

    Raises:
        ConfigError: activations of this dtype cannot travel.
    """
    for name, known in _BY_NAME.items():
        if known == dtype:
            return name
    raise ConfigError(f"dtype {dtype} cannot be served; use float32, bfloat16 or float16")


def named_dtype(name: str) -> torch.dtype:
    """The inverse of `dtype_name`."""
    return _BY_NAME[name]


def wire_dtype(dtype: torch.dtype) -> WireDtype:
    """The wire's name for a torch dtype."""
    return _TO_WIRE[dtype]


def tensor_bytes(hidden_TD: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, as a view when it is contiguous on the CPU."""
    flat = hidden_TD.detach().contiguous().cpu().view(torch.uint8)
    return memoryview(flat.numpy()).cast("B")


def tensor_from_payload(
    payload: bytearray | memoryview, offset: int, dtype: WireDtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """A tensor that views `payload[offset:]`, which must hold exactly its bytes.

    Raises:
        RemoteProtocolError: no dtype, or the byte count is not that of the shape.
    """
    if dtype not in _FROM_WIRE:
        raise RemoteProtocolError("a step without a tensor dtype")
    count = math.prod(shape)
    if len(payload) - offset != count * dtype.itemsize or not count:
        raise RemoteProtocolError("a step's tensor bytes do not match its shape")
    flat = torch.frombuffer(payload, dtype=_FROM_WIRE[dtype], count=count, offset=offset)
    return flat.view(shape)


def is_finite(hidden_TD: torch.Tensor) -> bool:
    """Whether no element is infinite or not a number."""
    # One operator instead of three: a sum shows what is not finite, and seldom more than that.
    return math.isfinite(hidden_TD.sum(dtype=torch.float32)) or bool(
        torch.isfinite(hidden_TD).all()
    )
