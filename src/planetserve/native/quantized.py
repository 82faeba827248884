"""Weights of 4 or 8 bits a number, in the panels that the kernels read.

A weight is `factor of its output * scale of its group * (number - zero point of its group)`, with
groups of neighbouring inputs. Numbers, scales and zero points keep the bits they are stored with.

Legend: O outputs, K inputs, G groups of inputs, P panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from planetserve.native import library, memory
from planetserve.native.library import PANEL

GROUP_MULTIPLE = 8
"""Sizes of groups are multiples of this."""
_MAX_FEW_ROWS = 4
"""As `AT_ONCE` in quantized.inc: more rows meet decoded weights."""
_KINDS = {torch.uint8: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
_SCALE_KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e8m0fnu: 3,
    torch.float8_e4m3fn: 4,
}
_PANELS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Numbers:
    """A matrix as it is stored, one number in each byte.

    Attributes:
        codes_OK: int8, float8_e4m3fn, or uint8 that say which of `table`.
        scales_OG: of a dtype in `SCALE_DTYPES`; None if there are no groups.
        zeros_OG: uint8 or None.
        factors_O: float32.
        table: 16 float32 numbers, for codes of 4 bits.
    """

    codes_OK: torch.Tensor
    scales_OG: torch.Tensor | None
    zeros_OG: torch.Tensor | None
    factors_O: torch.Tensor
    table: torch.Tensor | None = None

    @property
    def num_groups(self) -> int:
        grid_OG = self.scales_OG if self.scales_OG is not None else self.zeros_OG
        return 1 if grid_OG is None else int(grid_OG.shape[1])


SCALE_DTYPES = tuple(_SCALE_KINDS)


def is_readable(numbers: Numbers) -> bool:
    """Whether there are kernels here for such a matrix."""
    kernels = library.kernels()
    width, groups = numbers.codes_OK.shape[1], numbers.num_groups
    return (
        kernels is not None
        and kernels.reads_quantized_weights
        and numbers.codes_OK.dtype in _KINDS
        and (numbers.scales_OG is None or numbers.scales_OG.dtype in _SCALE_KINDS)
        and width % groups == 0
        and (width // groups) % GROUP_MULTIPLE == 0
    )


class QuantizedWeight:
    """A weight `[O, K]` in panels. Its tensors stay where they are.

    Args:
        parts: matrices one under the other, of equal width, groups, dtypes and table.

    Raises:
        ValueError: they differ, or `is_readable` says no.
    """

    def __init__(self, parts: Sequence[Numbers]):
        first = parts[0]
        if not all(map(is_readable, parts)) or any(not _are_alike(first, p) for p in parts):
            raise ValueError("these matrices have no common form that the kernels read")
        self.num_outputs = sum(len(part.codes_OK) for part in parts)
        self.num_inputs = first.codes_OK.shape[1]
        self._group = self.num_inputs // first.num_groups
        table = torch.zeros(16) if first.table is None else first.table.float()
        pack_codes = _pack_four_bits if first.codes_OK.dtype is torch.uint8 else _pack_bytes
        self._codes = _panels([part.codes_OK for part in parts], pack_codes)
        self._scales = None
        if first.scales_OG is not None:
            self._scales = _panels([p.scales_OG for p in parts if p.scales_OG is not None], _turn)
        self._zeros = None
        if first.zeros_OG is not None:
            self._zeros = _panels([p.zeros_OG for p in parts if p.zeros_OG is not None], _turn)
        factors_O = torch.cat([part.factors_O.float() for part in parts])
        self._factors = F.pad(factors_O, (0, -self.num_outputs % PANEL)).contiguous()
        self._table = table.contiguous()
        self._struct = library.Quantized(
            self._codes.data_ptr(),
            None if self._scales is None else self._scales.data_ptr(),
            None if self._zeros is None else self._zeros.data_ptr(),
            self._factors.data_ptr(),
            self._table.data_ptr(),
            self.num_inputs,
            self.num_outputs,
            self._group,
            _KINDS[first.codes_OK.dtype],
            0 if first.scales_OG is None else _SCALE_KINDS[first.scales_OG.dtype],
        )

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        tensors = (self._codes, self._scales, self._zeros, self._factors, self._table)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def multiply(self, x_TK: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        """`x W^T + bias`, `[T, O]`, in float32, as both arguments are."""
        kernels = library.kernels()
        if kernels is None:
            raise RuntimeError("the kernels that this weight was packed for are gone")
        group_sums_TG = None
        if self._zeros is not None and len(x_TK) <= _MAX_FEW_ROWS:
            group_sums_TG = x_TK.unflatten(1, (-1, self._group)).sum(-1)
        return kernels.quantized_linear(x_TK, self._struct, group_sums_TG, bias_O)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[O, K]` as plain numbers."""
        kernels = library.kernels()
        if kernels is None:
            raise RuntimeError("the kernels that this weight was packed for are gone")
        result_OK = torch.empty(self.num_outputs, self.num_inputs, dtype=dtype)
        for panel, rows in enumerate(result_OK.split(PANEL)):
            rows.copy_(kernels.decode_panel(self._struct, panel).t()[: len(rows)])
        return result_OK


def _are_alike(a: Numbers, b: Numbers) -> bool:
    def of(grid: torch.Tensor | None) -> object:
        return None if grid is None else (grid.dtype, grid.shape[1])

    same_table = (a.table is None) == (b.table is None) and (
        a.table is None or b.table is None or a.table.equal(b.table)
    )
    return same_table and all(
        of(getattr(a, name)) == of(getattr(b, name))
        for name in ("codes_OK", "scales_OG", "zeros_OG")
    )


def _panels(
    parts: Sequence[torch.Tensor], pack: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Panels of matrices one under the other, some at a time: packing takes several times their
    memory."""
    num_rows = sum(map(len, parts))
    result: torch.Tensor | None = None
    for first, rows_RK in _rows(parts, _PANELS_AT_ONCE * PANEL):
        packed = pack(F.pad(rows_RK, (0, 0, 0, -len(rows_RK) % PANEL)))
        if result is None:
            shape = (-(-num_rows // PANEL), *packed.shape[1:])
            result = memory.empty(shape, packed.dtype)
        result[first // PANEL : first // PANEL + len(packed)] = packed
    if result is None:
        raise ValueError("a weight without outputs")
    return result


def _rows(parts: Sequence[torch.Tensor], step: int) -> Iterator[tuple[int, torch.Tensor]]:
    """`step` rows at a time, of as many parts as they take; bytes of them, which can be padded."""
    num_rows = sum(map(len, parts))
    for first in range(0, num_rows, step):
        found, at = [], 0
        for part in parts:
            start, end = max(first - at, 0), min(first + step - at, len(part))
            if start < end:
                found.append(part[start:end])
            at += len(part)
        rows = torch.cat([_as_integers(part) for part in found])
        yield first, rows


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits as a dtype that every operator knows."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _pack_four_bits(codes_RK: torch.Tensor) -> torch.Tensor:
    """`[P, K / 8, PANEL]` words of eight numbers, lowest first."""
    nibbles = codes_RK.view(-1, PANEL, codes_RK.shape[1] // 8, 4, 2).int()
    pairs = nibbles[..., 0] | nibbles[..., 1] << 4
    words = pairs.to(torch.uint8).view(torch.int32).squeeze(-1)
    return words.transpose(1, 2)


def _pack_bytes(codes_RK: torch.Tensor) -> torch.Tensor:
    return codes_RK.view(-1, PANEL, codes_RK.shape[1]).transpose(1, 2)


_turn = _pack_bytes
"""`[P, G, PANEL]` of `[O, G]`."""
