"""The parts of a decoder layer, if it has the shape that most families share.

Norm, queries, keys and values, attention, output, norm, gated product: they are recognised by the
names of their modules, and every parameter must belong to one of them. The code between them is not
examined here; `probe` checks its results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planetserve.native import library

RmsNorm = tuple[torch.Tensor, float]
"""Weight and epsilon of an RMS norm."""

_PARTS = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
    "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_OPTIONAL_PARTS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Modules of the products, weights of the norms, and the width of a head."""

    entry: RmsNorm
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    output: nn.Module
    middle: RmsNorm
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    head_width: int


def recognise(layer: nn.Module) -> LayerParts | None:
    """The layer's parts, or None if it has others or lacks one."""
    parts = {name: _part(layer, name) for name in (*_PARTS, *_OPTIONAL_PARTS)}
    used = {id(p) for part in parts.values() if part is not None for p in part.parameters()}
    if any(parts[name] is None for name in _PARTS) or used != {id(p) for p in layer.parameters()}:
        return None
    norms = {name: _rms_norm(parts[name]) for name in parts if name.endswith("norm")}
    if any(parts[name] is not None and norm is None for name, norm in norms.items()):
        return None
    width = getattr(layer.self_attn, "head_dim", None)
    if not isinstance(width, int) or width % library.WIDTH_MULTIPLE:
        return None
    linear: Callable[[str], Any] = parts.__getitem__
    return LayerParts(
        entry=norms["input_layernorm"],  # type: ignore[arg-type]  # none is missing
        query=linear("self_attn.q_proj"),
        key=linear("self_attn.k_proj"),
        value=linear("self_attn.v_proj"),
        query_norm=norms["self_attn.q_norm"],
        key_norm=norms["self_attn.k_norm"],
        output=linear("self_attn.o_proj"),
        middle=norms["post_attention_layernorm"],  # type: ignore[arg-type]
        gate=linear("mlp.gate_proj"),
        up=linear("mlp.up_proj"),
        down=linear("mlp.down_proj"),
        head_width=width,
    )


def _part(layer: nn.Module, path: str) -> nn.Module | None:
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _rms_norm(module: nn.Module | None) -> RmsNorm | None:
    """Weight and epsilon of a module that may be an RMS norm."""
    if module is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight: torch.Tensor = module.weight.detach()
    if not isinstance(epsilon, float) or weight.dim() != 1 or weight.device.type != "cpu":
        return None
    return weight.contiguous(), epsilon
