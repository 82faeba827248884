"""Linear layers whose weight is stored in panels of 16 outputs, multiplied by this project's
kernels.

Made for the few rows of a decode step: a single row runs at memory bandwidth, and up to 14 rows
cost little more than one (`native/linear.inc`).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from planetserve.model.converted_linear import Converted
from planetserve.native import library


class _Native(Converted):
    @override
    def dense(self) -> torch.Tensor:
        return library.unpack(self.packed, self.num_outputs, self.num_inputs)

    @override
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        kernels = library.kernels()
        if kernels is None or x.shape[-1] != self.num_inputs:
            return nn.functional.linear(x, self.dense(), self.bias)
        x_RI = x if x.dim() == 2 else x.reshape(-1, self.num_inputs)
        if x_RI.stride(1) != 1:
            x_RI = x_RI.contiguous()
        y_RO = kernels.linear(x_RI, self.packed, self.num_outputs, self.bias)
        return y_RO if x.dim() == 2 else y_RO.view(*x.shape[:-1], self.num_outputs)


class NativeLinear(_Native, nn.Linear):
    """An `nn.Linear` with its weight in panels."""

    plain_type = nn.Linear


class NativeConv1D(_Native, Conv1D):
    """A `Conv1D` with its weight in panels."""

    plain_type = Conv1D


def pack(weight_OI: torch.Tensor) -> torch.Tensor | None:
    """The weight in panels, or None where there are no kernels for it."""
    if library.kernels() is None or weight_OI.shape[1] % 2:
        return None
    return library.pack(weight_OI)
