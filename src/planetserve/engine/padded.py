"""The chunks that share a padded pass, and the places of their keys and values.

Sequences lie in the rows of a rectangle and end together, as in a batch that is padded on the left.
The padding is read from the null page, whose zeros are finite, so that a mask can hide them.

Legend: B rows of a pass, one per chunk; T new tokens of each; S tokens of the longest sequence; N
slots; K heads of keys and values; D width of a head; R rows of single heads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from planetserve.engine.pinned_copy import integers
from planetserve.engine.ragged import MAX_GROUPED_TOKENS
from planetserve.model.span_blocks import KvShape
from planetserve.scheduler.batch import ScheduledChunk

_PASS_BYTES = 1 << 20
"""Constant time of a layer in a pass besides reading its weights, in bytes that could be read in
it."""
_MAX_COPIED_BYTES = 256 << 20
_UNLIMITED = 1 << 62
_TIMES_READ = 3
"""Memory accesses per copied key (read, written, read again); in a pass of its own, a key is read
once in place."""


class SharingLimits(NamedTuple):
    """When it pays to pad and copy contexts, all in tokens of the layer that caches most.

    Attributes:
        pass_tokens: tokens that can be read in a layer in the time that a pass of its own takes.
        max_copied: maximum tokens that a pass may copy in a layer, padding included.
    """

    pass_tokens: int
    max_copied: int

    @classmethod
    def of(
        cls, layers: Sequence[nn.Module], shapes: Sequence[KvShape], num_heads: int, itemsize: int
    ) -> SharingLimits:
        """For a span of `layers`, of which some cache `shapes`, in numbers of `itemsize` bytes.

        Without limits if there are none: states need no padding.

        `num_heads` are the heads of queries: where several share keys, the family's own code copies
        these for each of them before it multiplies.
        """
        if not shapes:
            return cls(_UNLIMITED, _UNLIMITED)
        shape = max(shapes, key=lambda s: s.num_heads * (s.key_dim + s.value_dim))
        num_heads = num_heads or shape.num_heads
        copied_heads = shape.num_heads + (2 * num_heads if num_heads > shape.num_heads else 0)
        kv_bytes = copied_heads * (shape.key_dim + shape.value_dim) * itemsize
        pass_bytes = sum(
            _PASS_BYTES + sum(p.numel() * p.dtype.itemsize for p in layer.parameters())
            for layer in layers
        )
        # Only some layers copy, but a pass of its own goes through all.
        return cls(pass_bytes // (len(shapes) * kv_bytes), _MAX_COPIED_BYTES // kv_bytes)

    def allow(self, context: int, longest: int, num_rows: int) -> bool:
        """Whether a sequence of `context` tokens should be the last of `num_rows` in a pass."""
        extra = _TIMES_READ * longest - context
        return extra <= self.pass_tokens and num_rows * longest <= self.max_copied

    def num_rows(self, context: int) -> int:
        """Most sequences of `context` tokens in a pass."""
        if not self.allow(context, context, 2):
            return 1
        return self.max_copied // context


def shared_passes(
    chunks: Sequence[ScheduledChunk], limits: SharingLimits, *, has_states: bool = False
) -> list[list[int]]:
    """The passes that serve all chunks, as lists of their indices in ascending order.

    With states, sequences that begin share no pass with others: layers compute their first state in
    another way.
    """
    passes = []
    short: dict[tuple[int, bool], list[int]] = {}
    for index, chunk in enumerate(chunks):
        if chunk.num_tokens <= MAX_GROUPED_TOKENS:
            kind = (chunk.num_tokens, has_states and not chunk.start)
            short.setdefault(kind, []).append(index)
        else:
            passes.append([index])
    for sized in short.values():
        sized.sort(key=lambda index: chunks[index].end, reverse=True)
        while sized:
            longest, count = chunks[sized[0]].end, 1
            while count < len(sized) and limits.allow(chunks[sized[count]].end, longest, count + 1):
                count += 1
            members, sized = sized[:count], sized[count:]
            passes.append(sorted(members))
    return passes


class Scratch:
    """Memory that all layers use in turn for what they gather.

    If every layer allocated its own, it would be mapped and cleared every time, which takes several
    times as long as the copy (measured on a CPU: 8 to 16 times).
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, num_rows: int, like_RD: torch.Tensor) -> torch.Tensor:
        """`[num_rows, D]` for rows like these; earlier results are overwritten."""
        width = like_RD.shape[1]
        size, memory = num_rows * width, self._memory
        if memory is None or memory.numel() < size or memory.dtype != like_RD.dtype:
            # More than is needed, because contexts grow with every step.
            memory = self._memory = like_RD.new_empty(size + size // 4)
        return memory[:size].view(num_rows, width)


class PaddedBatch:
    """Pieces of equally many tokens as the rows of a rectangle.

    Attributes:
        num_rows: B.
        num_tokens: T.
        num_keys: S.
        slots: where the `B * T` new tokens go.
        mask_BS: 0 for padding and 1 for tokens; None if nothing is padded.
    """

    def __init__(
        self, chunks: Sequence[ScheduledChunk], page_size: int, null_page: int, device: torch.device
    ):
        self.num_rows = len(chunks)
        self.num_tokens = chunks[0].num_tokens
        self.num_keys = max(chunk.end for chunk in chunks)
        slots = array("q")
        for chunk in chunks:
            slots.extend(chunk.slots)
        self.slots = integers(slots, device)
        self.mask_BS: torch.Tensor | None = None
        self._where: slice | torch.Tensor | None = None
        """The slots of all tokens, consecutive or `[B, S]`; None if all tokens are new."""
        self._index: dict[int, torch.Tensor] = {}
        if all(chunk.start == 0 for chunk in chunks):
            return
        pages = chunks[0].pages
        if len(chunks) == 1 and pages == array("i", range(pages[0], pages[0] + len(pages))):
            first = pages[0] * page_size
            self._where = slice(first, first + self.num_keys)
        else:
            self._where = self._find_slots(chunks, page_size, null_page, device)

    def all_tokens(
        self, new_BKTD: torch.Tensor, tokens_NKD: torch.Tensor, scratch: Scratch
    ) -> torch.Tensor:
        """`[B, K, S, D]`: the new tokens and those before them, out of all slots of a layer.

        Valid until the same `scratch` is used again.
        """
        where = self._where
        if where is None:
            return new_BKTD
        if isinstance(where, slice):
            return tokens_NKD[where].transpose(0, 1)[None]
        num_heads = tokens_NKD.shape[1]
        index = self._index.get(num_heads)
        if index is None:
            # By head and not by token: the result is contiguous, as families expect and as matrix
            # products need it (measured: 7 to 10 times faster), and the copy takes no longer.
            heads_K1 = torch.arange(num_heads, dtype=torch.int32, device=tokens_NKD.device)[:, None]
            index = (where[:, None] * num_heads + heads_K1).flatten()
            self._index[num_heads] = index
        heads_RD = tokens_NKD.flatten(0, 1)
        gathered = scratch.take(len(index), heads_RD)
        torch.index_select(heads_RD, 0, index, out=gathered)
        return gathered.view(self.num_rows, num_heads, self.num_keys, -1)

    def _find_slots(
        self, chunks: Sequence[ScheduledChunk], page_size: int, null_page: int, device: torch.device
    ) -> torch.Tensor:
        """Where all tokens lie, `[B, S]`."""
        width = max(len(chunk.pages) for chunk in chunks)
        numbers = array("i")
        for chunk in chunks:
            numbers.append(self.num_keys - chunk.end)
            numbers.extend(chunk.pages)
            numbers.extend([null_page] * (width - len(chunk.pages)))
        padding_B1, tables_BN = integers(numbers, device).view(-1, 1 + width).split((1, width), 1)
        positions_BS = torch.arange(self.num_keys, device=device) - padding_B1
        is_token_BS = positions_BS >= 0
        positions_BS.clamp_(min=0)
        slots_BS = tables_BN.gather(1, positions_BS // page_size) * page_size
        slots_BS += positions_BS % page_size
        if any(chunk.end < self.num_keys for chunk in chunks):
            slots_BS.masked_fill_(~is_token_BS, null_page * page_size)
            self.mask_BS = is_token_BS.long()
        return slots_BS
