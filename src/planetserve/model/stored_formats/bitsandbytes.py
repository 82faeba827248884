"""bitsandbytes as it saves: int8 with a scale for each row, or 4 bits through a table of 16.

Four bits are one column of bytes, the first number in the high half; scales are for blocks of
(mostly) 64 and may be numbers of 8 bits through a second table themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from planetserve.errors import ModelError
from planetserve.model.stored_formats.base import (
    ROWS,
    Headers,
    Layout,
    Method,
    Rule,
    Settings,
    Tensors,
    expect,
)
from planetserve.native.quantized import Numbers

_FLOAT32 = (torch.float32,)


def _int8_layout(headers: Headers, settings: Settings) -> Layout:
    weight = headers["weight"]
    expect(weight, "the weight", (torch.int8,))
    if len(weight.shape) != 2:
        raise ModelError(f"{weight.name} has shape {weight.shape}, which is no matrix")
    expect(headers["scale"], "its scales", _FLOAT32, weight.shape[:1])

    def check_format(tensors: Tensors) -> None:
        if "format" in tensors and int(tensors["format"]) != 0:
            raise ModelError("it is stored in tiles of a GPU; save it again with bitsandbytes 0.45")

    def numbers(tensors: Tensors) -> Iterator[Numbers]:
        check_format(tensors)
        yield Numbers(tensors["weight"], None, None, tensors["scale"] / 127)

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        check_format(tensors)
        result = torch.empty(weight.shape, dtype=dtype)
        scales = tensors["scale"] / 127
        for start in range(0, weight.shape[0], ROWS):
            part = slice(start, start + ROWS)
            result[part] = tensors["weight"][part].float() * scales[part, None]
        return result

    return Layout(weight.shape, decode, numbers)


def _four_bit_layout(headers: Headers, settings: Settings) -> Layout:
    weight, scale = headers["weight"], headers["scale"]
    expect(weight, "the weight", (torch.uint8,))
    expect(headers["table"], "its table", _FLOAT32, (16,))
    states = [headers[role] for role in ("nf4", "fp4") if role in headers]
    if not states:
        raise ModelError(f"{weight.name} has no quant_state beside it")
    expect(states[0], "its state", (torch.uint8,))
    is_nested = "nested_scale" in headers
    expect(scale, "its scales", (torch.uint8,) if is_nested else _FLOAT32)
    if is_nested and "nested_table" not in headers:
        raise ModelError(f"{scale.name} has no nested_quant_map beside it")
    num_bytes = math.prod(weight.shape)

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        shape, size, nested_size, offset = _state(tensors)
        if math.prod(shape) != 2 * num_bytes or len(tensors["scale"]) != -(-2 * num_bytes // size):
            raise ModelError(f"its state says shape {shape}, for {num_bytes} bytes of numbers")
        scales = tensors["scale"]
        if is_nested:
            nested = tensors["nested_scale"].repeat_interleave(nested_size)[: len(scales)]
            if len(nested) != len(scales) or len(tensors["nested_table"]) != 256:
                raise ModelError("its nested scales do not fit its scales")
            scales = tensors["nested_table"][scales.int()] * nested + offset
        table = tensors["table"]
        flat = tensors["weight"].flatten()
        result = torch.empty(2 * num_bytes, dtype=dtype)
        step = ROWS * size
        for start in range(0, 2 * num_bytes, step):
            packed = flat[start // 2 : (start + step) // 2]
            numbers = table[torch.stack([packed >> 4, packed & 15], dim=-1).flatten().int()]
            own = scales[start // size : (start + step) // size].repeat_interleave(size)
            result[start : start + step] = numbers * own[: len(numbers)]
        return result.view(shape)

    return Layout(None, decode)


def _state(tensors: Tensors) -> tuple[tuple[int, ...], int, int, float]:
    """Shape, sizes of blocks of numbers and of scales, and what is added to the scales."""
    raw = tensors["nf4"] if "nf4" in tensors else tensors["fp4"]
    try:
        state: Any = json.loads(bytes(raw.tolist()))
        shape = tuple(int(size) for size in state["shape"])
        sizes = int(state["blocksize"]), int(state.get("nested_blocksize", 256))
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError("its quant_state cannot be read") from error
    if min(*shape, *sizes) <= 0 or sizes[0] % 2 or not math.isfinite(offset):
        raise ModelError("its quant_state holds impossible sizes")
    return shape, *sizes, offset


BITSANDBYTES = Method(
    (
        Rule(
            marker=".weight.absmax",
            weight=".weight",
            required={
                "weight": ".weight", "scale": ".weight.absmax", "table": ".weight.quant_map",
            },
            optional={
                "nested_scale": ".weight.nested_absmax",
                "nested_table": ".weight.nested_quant_map",
                "nf4": ".weight.quant_state.bitsandbytes__nf4",
                "fp4": ".weight.quant_state.bitsandbytes__fp4",
            },
            layout=_four_bit_layout,
        ),
        Rule(
            marker=".SCB",
            weight=".weight",
            required={"weight": ".weight", "scale": ".SCB"},
            optional={"format": ".weight_format"},
            layout=_int8_layout,
        ),
    )
)  # fmt: skip
