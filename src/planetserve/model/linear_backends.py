"""Linear backends by name: the layout of a layer's weight and the operator that multiplies it.

A backend changes one `nn.Linear` (or GPT-2's `Conv1D`) in place and says what it has become:
`plain` is the layer as it is, `packed` oneDNN's blocked layout, `native` panels for the kernels of
this project (`planetserve.native`), which may not be installed. Every converted weight is first
checked against the plain product; if they differ, the layer stays plain. `auto` times all of them
once per shape and dtype. The original weight is freed; reading `.weight` of a converted layer makes
a copy.

CPU, float32 and bfloat16 only; elsewhere every backend leaves layers plain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from planetserve.model import native_linear, onednn_linear
from planetserve.model.converted_linear import (
    DTYPES,
    LAYER_TYPES,
    bare,
    install,
    is_right,
    weight_OI,
)
from planetserve.model.native_linear import NativeConv1D, NativeLinear
from planetserve.model.onednn_linear import PackedConv1D, PackedLinear, PaddedConv1D, PaddedLinear
from planetserve.native import memory
from planetserve.registry import Registry

PLAIN, PACKED, NATIVE = "plain", "packed", "native"

TIMED_ROWS = (1, 4, 16, 64)
_TIMED_ROUNDS = 3
_TIMING_LIMIT_S = 0.3
_LEAST_TIMED_ELEMENTS = 1 << 16
"""Minimum elements of a weight that is timed. Smaller ones stay plain, since calling an operator
costs more than it saves, unless larger ones have become native: a decode pass is one call only
where all products of its layers are native."""
_LEAST_GAIN = 1.05
_TIMED_ELEMENTS = 1 << 22
"""Elements of a larger weight that are timed."""
_EVICTED_BYTES = 32 << 20


class LinearBackend(Protocol):
    """Changes layers in place."""

    def convert(self, layer: nn.Module) -> str:
        """Change one layer of a type in `LAYER_TYPES`; returns the name of what it is now.

        The largest layers of a span come first.
        """
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
        NATIVE: "planetserve.model.linear_backends:Native",
    },
)


class Plain:
    """Changes nothing."""

    def convert(self, layer: nn.Module) -> str:
        return PLAIN

    def reasons(self) -> str:
        return ""


class _Layout:
    """Another layout of the weight, used where its results equal those of the plain layer."""

    name: str
    pack: Callable[[torch.Tensor], torch.Tensor | None]
    types: dict[type[nn.Module], type[Any]]

    def convert(self, layer: nn.Module) -> str:
        if why_not_convertible(layer):
            return PLAIN
        packed = self.pack(weight_OI(layer))
        layer_type = self.types[type(layer)]
        if packed is None or not is_right(layer, layer_type, packed):
            return PLAIN
        install(layer, layer_type, packed)
        return self.name

    def reasons(self) -> str:
        return ""


class Packed(_Layout):
    """oneDNN's blocked layout, multiplied with four rows at least."""

    name = PACKED
    pack = staticmethod(onednn_linear.pack)
    types = {nn.Linear: PaddedLinear, Conv1D: PaddedConv1D}


class Unpadded(Packed):
    """oneDNN's blocked layout, multiplied with the rows that there are."""

    types = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}


class Native(_Layout):
    """Panels for this project's kernels."""

    name = NATIVE
    pack = staticmethod(native_linear.pack)
    types = {nn.Linear: NativeLinear, Conv1D: NativeConv1D}


class Auto:
    """Whatever is fastest on this machine for a shape and dtype, timed once on a real weight."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[object, ...], LinearBackend] = {}
        self._reasons: list[str] = []

    def convert(self, layer: nn.Module) -> str:
        if why_not_convertible(layer):
            return PLAIN
        if layer.weight.numel() < _LEAST_TIMED_ELEMENTS:
            natives = [b for b in self._chosen.values() if isinstance(b, Native)]
            return natives[0].convert(layer) if natives else PLAIN
        key = (type(layer), layer.weight.shape, layer.weight.dtype)
        if key not in self._chosen:
            with memory.apart():
                self._chosen[key] = self._choose(weight_OI(layer))
        return self._chosen[key].convert(layer)

    def reasons(self) -> str:
        return "; ".join(self._reasons)

    def _choose(self, whole_OI: torch.Tensor) -> LinearBackend:
        """The fastest form over `TIMED_ROWS`, by the geometric mean."""
        # Part of a huge weight is enough, and saves time and memory.
        part_OI = timed_part(whole_OI)
        backends: list[Any] = [Plain()]
        forms: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda x: F.linear(x, part_OI)]
        for backend in (Unpadded(), Packed(), Native()):
            packed = backend.pack(part_OI)
            if packed is not None:
                backends.append(backend)
                forms.append(bare(backend.types[nn.Linear], packed, *part_OI.shape))
        times = time_all(forms, part_OI, TIMED_ROWS)
        gains = [[old / new for old, new in zip(times[0], own, strict=True)] for own in times]
        best = max(range(len(forms)), key=lambda index: _mean(gains[index]))
        if _mean(gains[best]) < _LEAST_GAIN:
            best = 0
        shown = ", ".join(f"{gain:.2f}" for gain in gains[best])
        shape = "x".join(map(str, whole_OI.shape))
        chosen: LinearBackend = backends[best]
        self._reasons.append(f"{shape} {(PLAIN, *(b.name for b in backends[1:]))[best]}: {shown}")
        return chosen


def why_not_convertible(layer: nn.Module) -> str | None:
    """Why a layer of this type must stay plain, or None."""
    if type(layer) not in LAYER_TYPES:
        return f"{type(layer).__name__} is no plain linear layer"
    weight = layer.weight
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    if weight.dtype not in DTYPES or (layer.bias is not None and layer.bias.dtype != weight.dtype):
        return f"its dtype is {weight.dtype}"
    if layer._forward_hooks or layer._forward_pre_hooks:  # noqa: SLF001 - no public way to ask
        return "something is hooked to it"
    return None


def timed_part(whole_OI: torch.Tensor) -> torch.Tensor:
    """As much of a weight as is timed."""
    return whole_OI[: max(1, _TIMED_ELEMENTS // whole_OI.shape[1])]


def time_all(
    forms: list[Callable[[torch.Tensor], torch.Tensor]],
    part_OI: torch.Tensor,
    numbers_of_rows: Sequence[int],
) -> list[list[float]]:
    """Seconds per form and number of rows, the least of a few alternating rounds.

    Between two calls the caches are filled with something else, as the other layers do in a pass.
    The processor time of this thread is measured, so that other programs do not change the result.
    """
    evict = torch.empty(_EVICTED_BYTES, dtype=torch.uint8)
    width = part_OI.shape[1]
    inputs = [torch.randn(rows, width).to(part_OI.dtype) for rows in numbers_of_rows]
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
