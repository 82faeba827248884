"""Keys and values of every session in pages, one pair of tensors per layer.

It knows slots and pages only; the scheduler knows which session owns them. Shapes are taken from
the first keys and values that each layer writes, because they differ between families (and keys
from values, under multi-head latent attention). Legend: P pages, S tokens per page, K heads of keys
and values, D width of a head, T tokens.

The page after the last one is never written: it stays zero and pads batched reads.
"""

from __future__ import annotations

import itertools
import math
import mmap
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from planetserve.engine.pinned_copy import integers


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer's cache: `keys_PSKD` and `values_PSKD`, and the same memory by slot."""

    keys_PSKD: torch.Tensor
    values_PSKD: torch.Tensor
    keys_NKD: torch.Tensor
    values_NKD: torch.Tensor


class PagedKvCache:
    """`num_pages` pages of `page_size` tokens for `num_layers` layers."""

    def __init__(self, num_layers: int, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._layers: list[LayerPages | None] = [None] * num_layers

    @property
    def null_page(self) -> int:
        """The number of the page of zeros, which no session owns."""
        return self.num_pages

    def write(
        self, layer: int, slots_T: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor
    ) -> LayerPages:
        """Store the keys and values of T tokens of one layer and return that layer's pages."""
        pages = self.layer(layer, key_TKD, value_TKD)
        pages.keys_NKD.index_copy_(0, slots_T, key_TKD)
        pages.values_NKD.index_copy_(0, slots_T, value_TKD)
        return pages

    def layer(self, layer: int, key_TKD: torch.Tensor, value_TKD: torch.Tensor) -> LayerPages:
        """A layer's pages, for keys and values like these."""
        pages = self._layers[layer]
        if pages is None:
            pages = self._layers[layer] = self._make_layer(key_TKD, value_TKD)
        return pages

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy `(source, destination)` pages in all layers; every source is read first."""
        tensors = list(self._tensors()) if copies else []
        if not tensors:
            return
        numbers = array("q", itertools.chain.from_iterable(copies))
        sources, targets = integers(numbers, tensors[0].device).view(-1, 2).unbind(1)
        for tensor in tensors:
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Fill pages with zeros in all layers."""
        tensors = list(self._tensors()) if pages else []
        if not tensors:
            return
        cleared = integers(array("q", pages), tensors[0].device)
        for tensor in tensors:
            tensor.index_fill_(0, cleared, 0)

    def _tensors(self) -> Iterator[torch.Tensor]:
        for layer in self._layers:
            if layer is not None:
                yield from (layer.keys_PSKD, layer.values_PSKD)

    def _make_layer(self, key_TKD: torch.Tensor, value_TKD: torch.Tensor) -> LayerPages:
        shape = (self.num_pages + 1, self.page_size)
        keys = _zeros_like(key_TKD, (*shape, *key_TKD.shape[1:]))
        values = _zeros_like(value_TKD, (*shape, *value_TKD.shape[1:]))
        return LayerPages(keys, values, keys.flatten(0, 1), values.flatten(0, 1))


def _zeros_like(sample: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros on the device and in the dtype of `sample`; a CPU's take no memory until written."""
    if sample.device.type != "cpu" or not math.prod(shape):
        return sample.new_zeros(shape)
    # `torch.zeros` writes them; a fresh mapping is zero without that.
    num_bytes = math.prod(shape) * sample.dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=sample.dtype).view(shape)
