"""Which kinds of layers a model has, and a checkpoint's first few blocks as a model of their own.

The first blocks keep their numbers, so a shortened checkpoint is the same files with another
configuration; tensors of the other blocks are not read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.decoder import Decoder
from planetserve.model.span_cache import layer_kinds
from planetserve.model.text_config import text_config


@dataclass(frozen=True, slots=True)
class BlockKind:
    """Blocks that are built alike.

    Attributes:
        name: what they consist of.
        blocks: their numbers, ascending.
    """

    name: str
    blocks: tuple[int, ...]


def block_kinds(decoder: Decoder) -> list[BlockKind]:
    """The kinds of a skeleton's blocks, in the order of their first ones."""
    text = text_config(decoder.base.config)
    caches = layer_kinds(text)
    types = getattr(text, "layer_types", None) or [""] * len(caches)
    found: dict[object, tuple[str, list[int]]] = {}
    for block, layer in enumerate(decoder.layers):
        shapes = tuple((name, tuple(value.shape)) for name, value in layer.named_parameters())
        kind = (types[block], caches[block], shapes)
        found.setdefault(kind, (_name(types[block], layer), []))[1].append(block)
    return [BlockKind(name, tuple(blocks)) for name, blocks in found.values()]


def _name(layer_type: str, layer: nn.Module) -> str:
    parts = [
        type(child).__name__
        for child in layer.children()
        if "norm" not in type(child).__name__.lower() and any(True for _ in child.parameters())
    ]
    return ": ".join(filter(None, (layer_type, " + ".join(parts) or type(layer).__name__)))


def num_blocks_of_each_kind(kinds: Iterable[BlockKind], at_least: int) -> int:
    """How many first blocks include one of each kind, and at least so many if there are."""
    kinds = list(kinds)
    num_blocks = sum(len(kind.blocks) for kind in kinds)
    return min(num_blocks, max(at_least, *(kind.blocks[0] + 1 for kind in kinds)))


def shortened(checkpoint: Checkpoint, num_blocks: int) -> Checkpoint:
    """The first blocks of a checkpoint as a model of their own.

    Raises:
        ModelError: its configuration does not let itself be shortened.
    """
    whole = checkpoint.num_blocks
    if num_blocks == whole:
        return checkpoint
    short = copy.copy(checkpoint)
    short.config = copy.deepcopy(checkpoint.config)
    text = text_config(short.config)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == whole:
            text.__dict__[name] = value[:num_blocks]
    if text.is_heterogeneous:
        own = text._heterogeneity_spec  # noqa: SLF001 - the setter would compare all layers again
        own.per_layer_overrides = {
            layer: values for layer, values in own.per_layer_overrides.items() if layer < num_blocks
        }
    with contextlib.suppress(AttributeError):  # where it is the length of a list
        text.num_hidden_layers = num_blocks
    if short.num_blocks != num_blocks:
        raise ModelError(
            f"{checkpoint.name}: its configuration does not say how to build {num_blocks} of its "
            f"{whole} blocks; check all of them with --whole"
        )
    return short


def num_parameters(module: nn.Module) -> int:
    """Numbers that a module's weights consist of; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def float32_bytes(decoder: Decoder, num_blocks: int, head: nn.Module | None) -> int:
    """Memory of a model's first blocks, its embedding and its head in float32."""
    outside = {id(p): p.numel() for p in decoder.base.parameters()}
    if head is not None:
        outside |= {id(p): p.numel() for p in head.parameters()}
    for layer in decoder.layers:
        for parameter in layer.parameters():
            outside.pop(id(parameter), None)
    blocks = sum(num_parameters(layer) for layer in list(decoder.layers)[:num_blocks])
    return (blocks + sum(outside.values())) * torch.float32.itemsize
