"""Linear layers in oneDNN's blocked layout, the one that `torch.compile` gives frozen weights.

The operators behind it are private to PyTorch; where they are missing nothing can be packed.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from planetserve.model.converted_linear import Converted

logger = logging.getLogger(__name__)

PADDED_ROWS = 4
"""Number of rows to which fewer may be padded: oneDNN is slower with one to three rows than with
four (measured)."""


class _Packed(Converted):
    padded_rows = 1
    """Minimum rows of an input; fewer are padded."""

    @override
    def dense(self) -> torch.Tensor:
        return self.packed.to_dense()

    @override
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows >= self.padded_rows:
            return product(x, self.packed, self.bias)
        x_RI = x.reshape(rows, x.shape[-1])
        missing = self.padded_rows - rows
        padded = F.pad(x_RI, (0, 0, 0, missing)) if rows != 1 else x_RI.expand(missing + 1, -1)
        result = product(padded, self.packed, self.bias)[:rows]
        return result.view(*x.shape[:-1], result.shape[1])


class PackedLinear(_Packed, nn.Linear):
    """An `nn.Linear` with a packed weight."""

    plain_type = nn.Linear


class PackedConv1D(_Packed, Conv1D):
    """A `Conv1D` with a packed weight."""

    plain_type = Conv1D


class PaddedLinear(PackedLinear):
    """As `PackedLinear`, with at least `PADDED_ROWS` rows."""

    padded_rows = PADDED_ROWS


class PaddedConv1D(PackedConv1D):
    """As `PackedConv1D`, with at least `PADDED_ROWS` rows."""

    padded_rows = PADDED_ROWS


def pack(weight_OI: torch.Tensor) -> torch.Tensor | None:
    """The weight in oneDNN's layout, or None where that is impossible."""
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


def product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` times a packed weight, plus `bias`."""
    operators = _operators()
    result: torch.Tensor = operators[1](x, packed, bias, "none", [], "")  # type: ignore[index]
    return result


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
