"""Experts of mixture layers as converted linear layers.

transformers keeps the weights of all experts of a layer in two parameters `[experts, ...]` and lets
`config._experts_implementation` choose how they multiply. Here each expert's part becomes a linear
layer of its own, which a linear backend converts like any other, and the tokens that chose an
expert go through it together. What lies between the two products (gates, activations, norms) stays
the family's own code. The result is compared with the family's before the old weights are freed.

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


class _ConvertedExperts(nn.Module):
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
        """The weighted sum of what a token's experts make of it, `[T, D]`."""
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


def why_not_convertible(module: nn.Module) -> str | None:
    """Why a module's experts must stay as they are, or None if it has experts that need not."""
    names = _weight_names(module)
    weights = [w for name in names if isinstance(w := getattr(module, name, None), nn.Parameter)]
    if not names or len(weights) < len(names) or any(w.dim() != 3 for w in weights):
        return f"{type(module).__name__} is no experts module of transformers' interface"
    if any(w.device.type != "cpu" or w.dtype not in DTYPES for w in weights):
        return "its weights are not on the CPU, or of another dtype"
    if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 - no public way to ask
        return "something is hooked to it"
    return None


def convert(module: Any, convert_layer: Callable[[nn.Module], str], plain: str) -> str:
    """Give every expert a linear backend in place; returns what the last one is now.

    Args:
        module: one for which `why_not_convertible` gives None.
        convert_layer: a backend's `convert`.
        plain: what that returns for a layer that it leaves alone; one such leaves all alone.
    """
    try:
        inputs = _trial_inputs(module)
        expected = [module(*arguments) for arguments in inputs]
    except Exception as error:  # noqa: BLE001 - a family's code may raise anything here
        logger.warning("experts stay plain: they fail in a trial (%s)", error)
        return plain
    products: list[nn.ModuleList] = []
    became = plain
    for name in _weight_names(module):
        layers, became = _converted(module, name, convert_layer, plain)
        if became == plain:
            _restore(module, products)
            return plain
        products.append(layers)
        # Before the next is converted: experts can be most of a model.
        del module._parameters[name]  # noqa: SLF001 - the class will have a property of this name
    module.__class__ = _type(type(module))
    module.entering, module.leaving = products
    try:
        if all(map(_is_close, (module(*arguments) for arguments in inputs), expected)):
            return became
        logger.warning("experts stay plain: their converted form gives something else")
    except Exception as error:  # noqa: BLE001 - as above
        logger.warning("experts stay plain: their converted form fails (%s)", error)
    unpack(module)
    return plain


def is_converted(module: nn.Module) -> bool:
    """Whether `convert` has changed it."""
    return isinstance(module, _ConvertedExperts)


def unpack(module: Any) -> None:
    """Give converted experts their own weights and code back; others are left alone."""
    if is_converted(module):
        products = module.entering, module.leaving
        del module.entering, module.leaving
        module.__class__ = module.plain_type
        _restore(module, products)


def _weight_names(module: Any) -> tuple[str, ...]:
    has_gate = getattr(module, "has_gate", None)
    if has_gate is None or not hasattr(module, "is_transposed"):
        return ()
    return ("gate_up_proj" if has_gate else "up_proj", "down_proj")


def _linear(module: Any, name: str, expert: int) -> nn.Linear:
    """One expert's product; shares the module's memory."""
    weight = getattr(module, name).detach()[expert]
    weight_OI = weight.t() if module.is_transposed else weight
    with torch.device("meta"):
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    if module.has_bias:
        bias_O = getattr(module, f"{name}_bias").detach()[expert]
        layer.bias = nn.Parameter(bias_O, requires_grad=False)
    return layer


def _converted(
    module: Any, name: str, convert_layer: Callable[[nn.Module], str], plain: str
) -> tuple[nn.ModuleList, str]:
    """One of the weights expert by expert, and what the last one is; ends at one that is plain."""
    layers, became = nn.ModuleList(), plain
    for expert in range(len(getattr(module, name))):
        layer = _linear(module, name, expert)
        became = convert_layer(layer)
        if became == plain:
            break
        layers.append(layer)
    return layers, became


def _multiply(layers: Iterable[Any], x_SD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each layer's product with as many rows as it has, one after the other."""
    ends = itertools.accumulate(counts)
    parts = [
        layer.multiply(x_SD[end - count : end])
        for layer, count, end in zip(layers, counts, ends, strict=True)
        if count
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _restore(module: Any, products: Iterable[nn.ModuleList]) -> None:
    """Give the module the weights that `products` were made of."""
    for name, layers in zip(_weight_names(module), products, strict=False):
        weight = _dense(layers, is_transposed=module.is_transposed)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def _dense(layers: Iterable[Any], *, is_transposed: bool) -> torch.Tensor:
    weights = [layer.dense() for layer in layers]
    return torch.stack([weight_OI.t() if is_transposed else weight_OI for weight_OI in weights])


def _type(own: type[nn.Module]) -> type[Any]:
    """The class of a converted module of class `own`."""

    def dense(layers: str) -> property:
        def read(module: Any) -> torch.Tensor:
            return _dense(getattr(module, layers), is_transposed=module.is_transposed)

        return property(read)

    # Copies of the old weights, for code that reads them elsewhere.
    copies = {"gate_up_proj": dense("entering"), "up_proj": dense("entering")}
    attributes = {"plain_type": own, "down_proj": dense("leaving"), **copies}
    return type(f"Converted{own.__name__}", (_ConvertedExperts, own), attributes)


def _trial_inputs(module: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    weight = getattr(module, _weight_names(module)[0])
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
