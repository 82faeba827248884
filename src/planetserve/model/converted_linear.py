"""Base of all converted linear layers: a weight in another layout, checked before its use.

A converted layer stays the same object; its class changes, and `packed` is its only parameter. The
layout's own products and copies are in `onednn_linear` and `native_linear`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
LAYER_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)
"""The exact types that backends change; a subclass may use its weight in another way."""

_CHECKED_ROWS = (1, 2, 5, 15, 33)
_COMPARED_ELEMENTS = 1 << 26
"""Maximum elements of a weight whose converted form is unpacked to compare it, which takes a third
copy."""
_SEED = 4


class Converted:
    """Mixin of a layer whose weight `[outputs, inputs]` is kept in another layout."""

    plain_type: ClassVar[type[nn.Module]]
    """The class of the layer before it was converted."""

    packed: torch.Tensor
    bias: torch.Tensor | None
    num_outputs: int
    num_inputs: int

    if TYPE_CHECKING:
        # Every layout has its own. Not an `ABC`: no object can change to such a class.
        def dense(self) -> torch.Tensor:
            """A plain copy of the weight `[outputs, inputs]`."""

        def multiply(self, x: torch.Tensor) -> torch.Tensor:
            """The layer's product, for `x` of the weight's dtype that needs no gradient."""

    @property
    def weight(self) -> torch.Tensor:
        """A plain copy of the weight: right for code that reads it, and slow."""
        weight_OI = self.dense()
        return weight_OI if self.plain_type is nn.Linear else weight_OI.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is self.packed.dtype and not (x.requires_grad and torch.is_grad_enabled()):
            return self.multiply(x)
        return F.linear(x, self.dense(), self.bias)


def weight_OI(layer: nn.Module) -> torch.Tensor:
    """The weight `[outputs, inputs]` of a layer that is not converted."""
    weight: torch.Tensor = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def bare(layer_type: type[Any], packed: torch.Tensor, num_outputs: int, num_inputs: int) -> Any:
    """A converted layer without a bias, for trials."""
    with torch.device("meta"):
        layer = nn.Linear(num_inputs, num_outputs, bias=False)
    install(layer, layer_type, packed)
    return layer


def install(layer: nn.Module, layer_type: type[Any], packed: torch.Tensor) -> None:
    """Exchange the layer's weight and class."""
    outputs, inputs = weight_OI(layer).shape
    del layer._parameters["weight"]  # noqa: SLF001 - the class has a property of this name
    layer.__class__ = layer_type
    layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
    layer.num_outputs, layer.num_inputs = outputs, inputs


def unpack(layer: nn.Module) -> None:
    """Make a converted layer plain again; others are left alone."""
    if not issubclass(type(layer), Converted):
        return
    weight = layer.weight
    del layer._parameters["packed"]  # noqa: SLF001
    layer.__class__ = layer.plain_type
    layer.register_parameter("weight", nn.Parameter(weight.contiguous(), requires_grad=False))


def is_right(layer: nn.Module, layer_type: type[Any], packed: torch.Tensor) -> bool:
    """Whether `packed` is the layer's weight and multiplies as it does, to within rounding."""
    plain_OI = weight_OI(layer)
    trial = bare(layer_type, packed, *plain_OI.shape)
    trial.bias = layer.bias
    generator = torch.Generator().manual_seed(_SEED)
    tolerance = 1e-5 if plain_OI.dtype == torch.float32 else 4 * torch.finfo(torch.bfloat16).eps
    try:
        if plain_OI.numel() <= _COMPARED_ELEMENTS and not trial.dense().equal(plain_OI):
            return False
        for rows in _CHECKED_ROWS:
            x = torch.randn(rows, plain_OI.shape[1], generator=generator).to(plain_OI.dtype)
            expected = F.linear(x, plain_OI, layer.bias).float()
            error = (trial.multiply(x).float() - expected).norm()
            if not error <= tolerance * expected.norm():  # also when either is not a number
                return False
    except (RuntimeError, TypeError) as error:
        logger.warning("a linear layer stays plain: its packed form fails (%s)", error)
        return False
    return True
