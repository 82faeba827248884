"""Converts the linear layers of a served span to a named backend.

Called once after loading, before anything runs. Names of modules stay; a layer whose weight the
family's own code reads elsewhere than in its product (found in a short trial pass) stays plain.
Experts of mixture layers are converted by `experts`. If the converted span fails its trial pass,
all of it goes back to plain layers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from planetserve.model import experts
from planetserve.model.converted_linear import unpack
from planetserve.model.linear_backends import BACKENDS, PLAIN, TIMED_ROWS, why_not_convertible
from planetserve.model.span_blocks import SpanBlocks

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 3


@torch.inference_mode()
def convert_span(blocks: SpanBlocks, backend_name: str) -> Counter[str]:
    """Convert the span's linear layers and experts in place; returns the number of layers per
    result.

    Raises:
        ConfigError: no backend of this name.
    """
    backend = BACKENDS.create(backend_name)
    if backend_name != PLAIN:
        for module in blocks.layers.modules():
            _make_plain(module)
    layers = [m for m in blocks.layers.modules() if why_not_convertible(m) is None]
    mixtures = [m for m in blocks.layers.modules() if experts.why_not_convertible(m) is None]
    all_plain = Counter({PLAIN: len(layers) + len(mixtures)})
    if backend_name == PLAIN or not (layers or mixtures):
        return all_plain
    run = _trial(blocks)
    read = _read_outside(layers, run)
    layers.sort(key=lambda layer: -layer.weight.numel())
    became = Counter(PLAIN if layer in read else backend.convert(layer) for layer in layers)
    became.update(experts.convert(mixture, backend.convert, PLAIN) for mixture in mixtures)
    try:
        run()
    except Exception as error:  # noqa: BLE001 - a family's code may raise anything here
        logger.warning("linear layers stay plain: the span fails with packed ones (%s)", error)
        for layer in layers:
            unpack(layer)
        for mixture in mixtures:
            experts.unpack(mixture)
        return all_plain
    summary = ", ".join(f"{count} {name}" for name, count in sorted(became.items()))
    _log(f"blocks {blocks.span}", summary, backend.reasons())
    return became


def _make_plain(module: nn.Module) -> None:
    """Change a layer of a subclass of `nn.Linear` to `nn.Linear`, if it multiplies in the same way.

    Falcon has such layers: they add the bias in a step of its own.
    """
    own = type(module)
    if (
        own is nn.Linear
        or not isinstance(module, nn.Linear)
        or not module.weight.is_floating_point()
    ):
        return
    held = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if not held <= {"weight", "bias"} or module.weight.dim() != 2:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIAL_TOKENS, module.in_features, generator=generator).to(module.weight)
    expected = F.linear(x, module.weight, module.bias)
    try:
        error = (module(x) - expected).float().norm()
    except Exception:  # noqa: BLE001 - whatever it is, it is no plain layer
        return
    if error <= 4 * torch.finfo(x.dtype).eps * expected.float().norm():
        module.__class__ = nn.Linear


def _log(what: str, became: str, reasons: str) -> None:
    if reasons:
        reasons = f" (times plain at {', '.join(map(str, TIMED_ROWS))} rows: {reasons})"
    logger.info("linear layers of %s: %s%s", what, became, reasons)


def _trial(blocks: SpanBlocks) -> Callable[[], torch.Tensor]:
    """A short pass of random tokens."""
    parameter = next(blocks.layers.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TRIAL_TOKENS, blocks.config.hidden_size, generator=generator)
    hidden_1TD = hidden.to(parameter.device, blocks.config.dtype)
    positions_1T = torch.arange(_TRIAL_TOKENS, device=parameter.device)[None]
    return lambda: blocks.run(hidden_1TD, positions_1T)


class _Watched:
    """Notes whether its weight is read by anything but its own forward."""

    @property
    def weight(self) -> torch.Tensor:
        state = self.__dict__
        state["was_read"] = state.get("was_read", False) or not state.get("is_inside", False)
        weight: torch.Tensor = state["_parameters"]["weight"]
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["is_inside"] = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__["is_inside"] = False


class _WatchedLinear(_Watched, nn.Linear):
    pass


class _WatchedConv1D(_Watched, Conv1D):
    pass


_WATCHED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _WatchedLinear,
    Conv1D: _WatchedConv1D,
}


def _read_outside(layers: list[nn.Module], run: Callable[[], object]) -> set[nn.Module]:
    """The layers whose weight is read elsewhere than in their own product."""
    own_types = [type(layer) for layer in layers]
    try:
        for layer, own in zip(layers, own_types, strict=True):
            layer.__class__ = _WATCHED[own]
        run()
        return {layer for layer in layers if layer.__dict__.get("was_read", False)}
    finally:
        for layer, own in zip(layers, own_types, strict=True):
            layer.__class__ = own
            layer.__dict__.pop("was_read", None)
            layer.__dict__.pop("is_inside", None)
