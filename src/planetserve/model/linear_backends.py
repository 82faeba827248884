"""Linear backends by name: how a layer's weight lies in memory and which operator multiplies it.

A backend changes one `nn.Linear` (or GPT-2's `Conv1D`) in place and says what it has become:
`plain` is the layer as it is; `packed` stores its weight in oneDNN's blocked layout, the one that
`torch.compile` gives frozen weights. The operators behind it are private to PyTorch, so every
packed weight is checked against the plain product first and left alone if anything is in doubt.
`auto` times both once per shape and dtype. The original weight is freed; reading `.weight` of a
packed layer unpacks a copy.

CPU, float32 and bfloat16 only; elsewhere every backend leaves layers plain.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from planetserve.registry import Registry

logger = logging.getLogger(__name__)

PLAIN, PACKED = "plain", "packed"

_DTYPES = (torch.float32, torch.bfloat16)
_PADDED_ROWS = 4
"""oneDNN is slower with one to three rows than with four, so fewer may be padded (measured)."""
_CHECKED_ROWS = (1, 2, 5, 33)
TIMED_ROWS = (1, 4, 16, 64)
_TIMED_ROUNDS = 3
_TIMING_LIMIT_S = 0.3
_LEAST_ELEMENTS = 1 << 16
"""`auto` leaves smaller weights plain: calling the operator costs more than it saves."""
_LEAST_GAIN = 1.05
_TIMED_ELEMENTS = 1 << 22
"""Of larger weights only this part is timed."""
_COMPARED_ELEMENTS = 1 << 26
"""The packed form of larger weights is not unpacked to compare it: that would take a third copy."""
_EVICTED_BYTES = 32 << 20
_SEED = 4


class LinearBackend(Protocol):
    """Changes layers in place."""

    def convert(self, layer: nn.Module) -> str:
        """Change one layer of a type in `LAYER_TYPES`; returns the name of what it is now."""
        ...

    def reasons(self) -> str:
        """What was measured so far, in one line for the log; empty if nothing was."""
        ...


BACKENDS: Registry[LinearBackend] = Registry(
    "linear backend",
    "linear_backends",
    {
        "auto": "planetserve.model.linear_backends:Auto",
        PLAIN: "planetserve.model.linear_backends:Plain",
        PACKED: "planetserve.model.linear_backends:Packed",
    },
)


class _PackedMixin:
    """`forward` and `weight` of a layer whose weight `[out, in]` is packed."""

    packed: torch.Tensor
    bias: torch.Tensor | None
    padded_rows: int
    is_weight_out_first: bool

    @property
    def weight(self) -> torch.Tensor:
        """A plain copy of the weight: right for code that reads it, and slow."""
        weight_OI = self.packed.to_dense()
        return weight_OI if self.is_weight_out_first else weight_OI.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.packed.to_dense(), self.bias)
        rows = x.numel() // x.shape[-1]
        if rows >= self.padded_rows:
            return _multiply(x, self.packed, self.bias)
        x_RI = x.reshape(rows, x.shape[-1])
        missing = self.padded_rows - rows
        padded = F.pad(x_RI, (0, 0, 0, missing)) if rows != 1 else x_RI.expand(missing + 1, -1)
        result = _multiply(padded, self.packed, self.bias)[:rows]
        return result.view(*x.shape[:-1], result.shape[1])


class PackedLinear(_PackedMixin, nn.Linear):
    """An `nn.Linear` with a packed weight; made by `Packed.convert`."""

    is_weight_out_first = True


class PackedConv1D(_PackedMixin, Conv1D):
    """A `Conv1D` with a packed weight; made by `Packed.convert`."""

    is_weight_out_first = False


_PACKED_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PackedLinear,
    Conv1D: PackedConv1D,
}
LAYER_TYPES = tuple(_PACKED_TYPES)
"""The exact types that backends change; a subclass may mean something else by its weight."""


class Plain:
    """Changes nothing."""

    def convert(self, layer: nn.Module) -> str:
        return PLAIN

    def reasons(self) -> str:
        return ""


class Packed:
    """oneDNN's blocked layout, wherever it gives what the plain layer gives.

    Args:
        padded_rows: inputs of fewer rows are padded to this many.
    """

    def __init__(self, padded_rows: int = _PADDED_ROWS):
        self._padded_rows = padded_rows

    def convert(self, layer: nn.Module) -> str:
        if why_not_convertible(layer):
            return PLAIN
        packed = _pack(_weight_OI(layer))
        if packed is None or not _is_right(layer, packed):
            return PLAIN
        _install(layer, packed, self._padded_rows)
        return PACKED

    def reasons(self) -> str:
        return ""


class Auto:
    """Whatever is fastest on this machine for a shape and dtype, timed once on a real weight."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[object, ...], LinearBackend] = {}
        self._reasons: list[str] = []

    def convert(self, layer: nn.Module) -> str:
        if why_not_convertible(layer) or layer.weight.numel() < _LEAST_ELEMENTS:
            return PLAIN
        key = (type(layer), layer.weight.shape, layer.weight.dtype)
        if key not in self._chosen:
            self._chosen[key] = self._choose(_weight_OI(layer))
        return self._chosen[key].convert(layer)

    def reasons(self) -> str:
        return "; ".join(self._reasons)

    def _choose(self, weight_OI: torch.Tensor) -> LinearBackend:
        """The fastest form over `TIMED_ROWS`, by the geometric mean."""
        # A part of a huge weight is enough, and keeps time and memory small.
        part_OI = weight_OI[: max(1, _TIMED_ELEMENTS // weight_OI.shape[1])]
        forms: list[tuple[str, LinearBackend, Callable[[torch.Tensor], torch.Tensor]]] = [
            (PLAIN, Plain(), lambda x: F.linear(x, part_OI))
        ]
        packed = _pack(part_OI)
        if packed is not None:
            for rows in (1, _PADDED_ROWS):
                forms.append((PACKED, Packed(rows), _packed_layer(packed, rows).forward))
        times = _time_all([forward for _, _, forward in forms], part_OI)
        gains = [[old / new for old, new in zip(times[0], own, strict=True)] for own in times]
        best = max(range(len(forms)), key=lambda index: _mean(gains[index]))
        if _mean(gains[best]) < _LEAST_GAIN:
            best = 0
        shown = ", ".join(f"{gain:.2f}" for gain in gains[best])
        shape = "x".join(map(str, weight_OI.shape))
        self._reasons.append(f"{shape} {forms[best][0]}: {shown}")
        return forms[best][1]


def why_not_convertible(layer: nn.Module) -> str | None:
    """Why a layer of this type must stay plain, or None."""
    if type(layer) not in LAYER_TYPES:
        return f"{type(layer).__name__} is no plain linear layer"
    weight = layer.weight
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    if weight.dtype not in _DTYPES or (layer.bias is not None and layer.bias.dtype != weight.dtype):
        return f"its dtype is {weight.dtype}"
    if layer._forward_hooks or layer._forward_pre_hooks:  # noqa: SLF001 - no public way to ask
        return "something is hooked to it"
    return None


@functools.cache
def _operators() -> tuple[Any, Any] | None:
    """oneDNN's packing and multiplying operators, if this PyTorch has them."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        operators = torch.ops.mkldnn
        return operators._reorder_linear_weight.default, operators._linear_pointwise.default  # noqa: SLF001
    except (AttributeError, RuntimeError):
        return None


def _pack(weight_OI: torch.Tensor) -> torch.Tensor | None:
    operators = _operators()
    if operators is None:
        return None
    try:
        packed: torch.Tensor = operators[0](weight_OI.contiguous(), None)
        return packed if packed.is_mkldnn else None
    except (RuntimeError, TypeError) as error:  # unknown instruction sets, changed signatures
        logger.warning("linear layers stay plain: oneDNN cannot pack them (%s)", error)
        _operators.cache_clear()
        return None


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    operators = _operators()
    result: torch.Tensor = operators[1](x, packed, bias, "none", [], "")  # type: ignore[index]
    return result


def _weight_OI(layer: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _packed_layer(packed: torch.Tensor, padded_rows: int) -> PackedLinear:
    with torch.device("meta"):
        layer = nn.Linear(packed.shape[1], packed.shape[0], bias=False)
    _install(layer, packed, padded_rows)
    return layer


def _install(layer: nn.Module, packed: torch.Tensor, padded_rows: int) -> None:
    """Exchange the layer's weight; the object stays the one that everybody refers to."""
    del layer._parameters["weight"]  # noqa: SLF001 - the class below has a property of this name
    layer.__class__ = _PACKED_TYPES[type(layer)]
    layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
    layer.padded_rows = padded_rows


def unpack(layer: nn.Module) -> None:
    """Make a packed layer plain again."""
    weight = layer.weight
    del layer._parameters["packed"]  # noqa: SLF001
    layer.__class__ = next(old for old, new in _PACKED_TYPES.items() if new is type(layer))
    layer.register_parameter("weight", nn.Parameter(weight.contiguous(), requires_grad=False))


def _is_right(layer: nn.Module, packed: torch.Tensor) -> bool:
    """Whether the packed weight is the plain one and multiplies as it does, to within rounding."""
    weight_OI = _weight_OI(layer)
    generator = torch.Generator().manual_seed(_SEED)
    tolerance = 1e-5 if weight_OI.dtype == torch.float32 else 4 * torch.finfo(torch.bfloat16).eps
    try:
        if weight_OI.numel() <= _COMPARED_ELEMENTS and not packed.to_dense().equal(weight_OI):
            return False
        for rows in _CHECKED_ROWS:
            x = torch.randn(rows, weight_OI.shape[1], generator=generator).to(weight_OI.dtype)
            expected = F.linear(x, weight_OI, layer.bias).float()
            error = (_multiply(x, packed, layer.bias).float() - expected).norm()
            if not error <= tolerance * expected.norm():  # also when either is not a number
                return False
    except (RuntimeError, TypeError) as error:
        logger.warning("a linear layer stays plain: its packed form fails (%s)", error)
        return False
    return True


def _time_all(
    forms: list[Callable[[torch.Tensor], torch.Tensor]], weight_OI: torch.Tensor
) -> list[list[float]]:
    """Seconds per form and number of rows, the least of a few alternating rounds.

    Between two calls the caches are filled with something else, as the other layers do in a pass.
    This thread's processor time is taken, not the clock's: other programs must not decide.
    """
    evict = torch.empty(_EVICTED_BYTES, dtype=torch.uint8)
    width = weight_OI.shape[1]
    inputs = [torch.randn(rows, width).to(weight_OI.dtype) for rows in TIMED_ROWS]
    times = [[float("inf")] * len(inputs) for _ in forms]
    started_s = time.thread_time()
    for _ in range(_TIMED_ROUNDS):
        for index, x in enumerate(inputs):
            for form, forward in enumerate(forms):
                evict.fill_(index)
                begin_s = time.thread_time()
                forward(x)
                times[form][index] = min(times[form][index], time.thread_time() - begin_s)
        if time.thread_time() - started_s > _TIMING_LIMIT_S:
            break
    return times


def _mean(gains: list[float]) -> float:
    """The geometric mean."""
    return float(torch.tensor(gains).log().mean().exp())
