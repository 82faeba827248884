"""Experts of mixture layers as linear layers.

transformers keeps the weights of all experts of a layer in two parameters `[experts, ...]` and lets
`config._experts_implementation` choose how they multiply. Here each expert's part becomes a linear
layer of its own, which a linear backend converts or bitsandbytes quantises like any other, and the
tokens that chose an expert go through it together. The code between the two products (gates,
activations, norms) stays the family's own.

Legend: T tokens, K experts that a token chose, S = T * K choices, D hidden size.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from planetserve.model.converted_linear import DTYPES

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = (1, 5)
_SEED = 5


class _SplitExperts(nn.Module):
    """Mixin of an experts module whose products are linear layers, in front of its own class."""

    entering: nn.ModuleList
    leaving: nn.ModuleList

    if TYPE_CHECKING:
        num_experts: int
        has_gate: bool
        has_post_expert_norm: bool
        is_transposed: bool
        act_fn: Callable[[torch.Tensor], torch.Tensor]
        post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
        _apply_gate: Callable[[torch.Tensor], torch.Tensor]

    def forward(
        self, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the outputs of a token's experts, `[T, D]`."""
        num_tokens, num_chosen = chosen_TK.shape
        chosen_S = chosen_TK.flatten()
        order_S = chosen_S.argsort(stable=True)
        counts = torch.bincount(chosen_S, minlength=self.num_experts).tolist()
        x = _multiply(self.entering, hidden_TD[order_S // num_chosen], counts)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = _multiply(self.leaving, x, counts)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        x = x * weights_TK.flatten()[order_S, None]
        sorted_back = torch.empty_like(x)
        sorted_back[order_S] = x
        return sorted_back.view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden_TD.dtype)


def has_experts(module: nn.Module) -> bool:
    """Whether it is an experts module of transformers' interface, as it was loaded."""
    weights = _weights(module)
    return bool(weights) and all(weight.dim() == 3 for weight in weights)


def num_weights(module: nn.Module) -> int:
    """Elements of all experts' matrices; 0 for a module without experts."""
    return sum(w.numel() for w in _weights(module)) if has_experts(module) else 0


def why_not_convertible(module: nn.Module) -> str | None:
    """Why a module's experts must stay as they are, or None if it has experts that need not."""
    weights = _weights(module)
    if not has_experts(module):
        return f"{type(module).__name__} is no experts module of transformers' interface"
    if any(w.device.type != "cpu" or w.dtype not in DTYPES for w in weights):
        return "its weights are not on the CPU, or of another dtype"
    if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 - no public way to ask
        return "something is hooked to it"
    return None


def convert(module: Any, convert_layer: Callable[[nn.Module], str], plain: str) -> str:
    """Give every expert a linear backend in place; returns what the last one is now.

    The result is compared with that of the family's code; if they differ, everything is restored.

    Args:
        module: one for which `why_not_convertible` gives None.
        convert_layer: a backend's `convert`.
        plain: what that returns for a layer that it does not convert; one such layer leaves all
            experts as they are.
    """
    became = plain

    def convert_one(layer: nn.Module, _: str) -> nn.Module | None:
        nonlocal became
        became = convert_layer(layer)
        return None if became == plain else layer

    try:
        inputs = _trial_inputs(module)
        expected = [module(*arguments) for arguments in inputs]
    except Exception as error:  # noqa: BLE001 - a family's code may raise anything here
        logger.warning("experts stay plain: a trial of them fails (%s)", error)
        return plain
    # No fallback here: an error is not the family's, and half of the experts may be replaced.
    if not split(module, convert_one):
        return plain
    try:
        if all(map(_is_close, (module(*arguments) for arguments in inputs), expected)):
            return became
        logger.warning("experts stay plain: their converted form gives something else")
    except Exception as error:  # noqa: BLE001 - as above
        logger.warning("experts stay plain: their converted form fails (%s)", error)
    unpack(module)
    return plain


def split(module: Any, make_layer: Callable[[nn.Module, str], nn.Module | None]) -> bool:
    """Put layers made by `make_layer` in the place of the experts' weights.

    Args:
        module: with experts.
        make_layer: gets an `nn.Linear` that shares the module's memory, and the name of the
            parameter that it is a part of, one expert after the other. Its result takes the place;
            after None the module keeps its weights, and those that are replaced already must be
            `Converted` layers.

    Returns:
        Whether all have been replaced.
    """
    products: list[nn.ModuleList] = []
    for name in weight_names(module):
        products.append(nn.ModuleList())
        for expert in range(len(getattr(module, name))):
            layer = make_layer(_linear(module, name, expert), name)
            if layer is None:
                _restore(module, products[:-1])
                return False
            products[-1].append(layer)
        # Freed before the next is replaced: experts can be most of a model.
        del module._parameters[name]  # noqa: SLF001 - the class will have a property of this name
    module.__class__ = _type(type(module))
    module.entering, module.leaving = products
    return True


def is_split(module: nn.Module) -> bool:
    """Whether its experts are linear layers."""
    return isinstance(module, _SplitExperts)


def unpack(module: Any) -> None:
    """Give a module with converted experts its own weights and code back; others are left alone."""
    if is_split(module):
        products = module.entering, module.leaving
        del module.entering, module.leaving
        module.__class__ = module.plain_type
        _restore(module, products)


def weight_names(module: Any) -> tuple[str, ...]:
    """The parameters that hold all experts' weights; none for another module."""
    has_gate = getattr(module, "has_gate", None)
    if has_gate is None or not hasattr(module, "is_transposed"):
        return ()
    return ("gate_up_proj" if has_gate else "up_proj", "down_proj")


def _weights(module: nn.Module) -> list[nn.Parameter]:
    parameters = dict(module.named_parameters(recurse=False))
    return [parameters[name] for name in weight_names(module) if name in parameters]


def _linear(module: Any, name: str, expert: int) -> nn.Linear:
    """One expert's product, in the module's own memory."""
    weight = getattr(module, name).detach()[expert]
    weight_OI = weight.t() if module.is_transposed else weight
    with torch.device("meta"):
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    if module.has_bias:
        bias_O = getattr(module, f"{name}_bias").detach()[expert]
        layer.bias = nn.Parameter(bias_O, requires_grad=False)
    return layer


def _multiply(layers: Iterable[Any], x_SD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each layer's product with as many rows as it has, one after the other."""
    ends = itertools.accumulate(counts)
    parts = [
        layer(x_SD[end - count : end])
        for layer, count, end in zip(layers, counts, ends, strict=True)
        if count
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _restore(module: Any, products: Iterable[nn.ModuleList]) -> None:
    """Give the module the weights that `products` were made of."""
    for name, layers in zip(weight_names(module), products, strict=False):
        weight = _dense(layers, is_transposed=module.is_transposed)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def _dense(layers: Iterable[Any], *, is_transposed: bool) -> torch.Tensor:
    weights = [layer.dense() for layer in layers]
    return torch.stack([weight_OI.t() if is_transposed else weight_OI for weight_OI in weights])


def _type(own: type[nn.Module]) -> type[Any]:
    """The class of a split module of class `own`."""

    def dense(layers: str) -> property:
        def read(module: Any) -> torch.Tensor:
            return _dense(getattr(module, layers), is_transposed=module.is_transposed)

        return property(read)

    # Copies of the old weights, for code that reads them elsewhere.
    copies = {"gate_up_proj": dense("entering"), "up_proj": dense("entering")}
    attributes = {"plain_type": own, "down_proj": dense("leaving"), **copies}
    return type(f"Split{own.__name__}", (_SplitExperts, own), attributes)


def _trial_inputs(module: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    weight = getattr(module, weight_names(module)[0])
    width = weight.shape[1] if module.is_transposed else weight.shape[2]
    generator = torch.Generator().manual_seed(_SEED)
    inputs = []
    for num_tokens in _TRIAL_TOKENS:
        x_TD = torch.randn(num_tokens, width, generator=generator).to(weight.dtype)
        scores = torch.rand(num_tokens, module.num_experts, generator=generator)
        weights_TK, chosen_TK = scores.to(weight.dtype).topk(min(2, module.num_experts))
        inputs.append((x_TD, chosen_TK, weights_TK))
    return inputs


def _is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they are the same to within rounding."""
    half = expected.dtype != torch.float32
    tolerance = 8 * torch.finfo(expected.dtype).eps if half else 1e-5
    error = (actual.float() - expected.float()).norm()
    return bool(error <= tolerance * expected.float().norm())  # not if either is not a number
