"""The layout of one ragged batch: the keys that each token may see, and their places.

Computed once per batch and per kind of visibility (full, sliding window, chunked), then used by
every layer. Pieces of equal length whose contexts are about as long are put in one group, so that
one attention call serves them all; a group of one reads its keys in place when its pages are
consecutive.

Legend: B chunks in a group, T new tokens per chunk, S visible keys, N pages.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from planetserve.engine.pinned_copy import integers
from planetserve.scheduler.batch import ScheduledChunk

MAX_GROUPED_TOKENS = 16
"""Maximum new tokens of a chunk that is grouped."""

_MAX_PADDING = 2
"""Maximum ratio of the longest to the shortest context of a group."""


class Visibility(NamedTuple):
    """Which earlier tokens a token sees: all, the last `window`, or those of its own chunk."""

    window: int | None = None
    chunk: int | None = None

    def first_key(self, position: int) -> int:
        """The earliest position that the token at `position` sees."""
        if self.chunk is not None:
            return position - position % self.chunk
        if self.window is not None:
            return max(0, position + 1 - self.window)
        return 0


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces that one attention call serves.

    Attributes:
        num_chunks: B.
        num_tokens: T.
        tokens: where the B * T tokens are in the batch: a slice, or an index tensor.
        is_fresh: the whole visible context is among the new tokens; nothing is read from pages.
        slots: the keys' slots if they are consecutive (only for B = 1).
        pages: else the pages to gather, `[B * N]`, shorter tables padded with the null page.
        keys: which of the gathered `N * S` keys count (only for B = 1).
        mask_BTS: True where a token sees a key; None if every token sees every key, or, when
            `is_fresh`, if a plain causal mask is enough.
    """

    num_chunks: int
    num_tokens: int
    tokens: slice | torch.Tensor
    is_fresh: bool
    slots: slice | None
    pages: torch.Tensor | None
    keys: slice | None
    mask_BTS: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ShortChunks:
    """The chunks of a few tokens, as kernels that follow page tables take them.

    Attributes:
        chunks_N4: int64; per chunk its first token in the batch, its tokens, the position of the
            first one, and where its page table starts in `tables`.
        tables: int32 page numbers.
        max_context: tokens of the longest sequence.
        is_all: whether the batch has no other chunks.
    """

    chunks_N4: torch.Tensor
    tables: torch.Tensor
    max_context: int
    is_all: bool


@dataclass(frozen=True, slots=True)
class PageTables:
    """All chunks, as kernels take them that serve a whole batch; int32, on the batch's device.

    Attributes:
        offsets_M: of B + 1 numbers, where each chunk's tokens begin in the batch, and the end.
        contexts_B: per chunk, its sequence's tokens up to and including these.
        context_offsets_M: start of each sequence in the concatenation of all, and the end.
        tables_BN: page tables, shorter ones padded with the null page.
        max_tokens: tokens of the longest chunk.
        max_context: tokens of the longest sequence.
    """

    offsets_M: torch.Tensor
    contexts_B: torch.Tensor
    context_offsets_M: torch.Tensor
    tables_BN: torch.Tensor
    max_tokens: int
    max_context: int


class RaggedBatch:
    """Chunks concatenated in one `[1, tokens, hidden]` pass."""

    def __init__(
        self,
        chunks: Sequence[ScheduledChunk],
        page_size: int,
        null_page: int,
        max_grouped_context: int,
        device: torch.device,
    ):
        """Args:
        max_grouped_context: contexts of more tokens are not grouped, because gathering them
            costs more than separate calls.
        """
        self._chunks = chunks
        self._page_size = page_size
        self._null_page = null_page
        self._max_grouped_pages = max_grouped_context // page_size
        self._device = device
        self._groups: dict[tuple[Visibility, int], tuple[Group, ...]] = {}
        self._short: dict[int, ShortChunks] = {}
        self._tables: PageTables | None = None
        slots = array("q")
        self._offsets = []
        for chunk in chunks:
            self._offsets.append(len(slots))
            slots.extend(chunk.slots)
        self.slots_T = integers(slots, device)

    def groups(self, visibility: Visibility, longer_than: int = 0) -> tuple[Group, ...]:
        """The attention calls that serve the chunks of more than `longer_than` tokens.

        Together they cover every token of these chunks once.
        """
        found = self._groups.get((visibility, longer_than))
        if found is None:
            made = tuple(self._make_groups(visibility, longer_than))
            found = self._groups[visibility, longer_than] = made
        return found

    def short(self, max_tokens: int) -> ShortChunks:
        """The chunks of at most `max_tokens` tokens."""
        found = self._short.get(max_tokens)
        if found is None:
            found = self._short[max_tokens] = self._make_short(max_tokens)
        return found

    def tables(self) -> PageTables:
        """All chunks."""
        if self._tables is None:
            self._tables = self._make_tables()
        return self._tables

    def _make_tables(self) -> PageTables:
        chunks, count = self._chunks, len(self._chunks)
        tokens = [chunk.num_tokens for chunk in chunks]
        contexts = [chunk.end for chunk in chunks]
        width = max(len(chunk.pages) for chunk in chunks)
        numbers = array("i", itertools.accumulate(tokens, initial=0))
        numbers.extend(contexts)
        numbers.extend(itertools.accumulate(contexts, initial=0))
        numbers += self._padded([chunk.pages for chunk in chunks], width)
        # One copy to the device, whose parts the kernel takes.
        offsets, ends, context_offsets, tables = integers(numbers, self._device).split(
            (count + 1, count, count + 1, count * width)
        )
        return PageTables(
            offsets, ends, context_offsets, tables.view(count, width), max(tokens), max(contexts)
        )

    def _padded(self, tables: Sequence[array[int]], num_pages: int) -> array[int]:
        """Page tables of equal length, one after the other."""
        flat = array("i")
        for table in tables:
            flat += table
            flat.extend([self._null_page] * (num_pages - len(table)))
        return flat

    def _make_short(self, max_tokens: int) -> ShortChunks:
        numbers, tables, longest = array("q"), array("i"), 0
        for chunk, offset in zip(self._chunks, self._offsets, strict=True):
            if chunk.num_tokens <= max_tokens:
                numbers.extend((offset, chunk.num_tokens, chunk.start, len(tables)))
                tables.extend(chunk.pages)
                longest = max(longest, chunk.end)
        if not numbers:
            empty = torch.empty(0, 4, dtype=torch.int64)
            return ShortChunks(empty, torch.empty(0, dtype=torch.int32), 0, is_all=False)
        return ShortChunks(
            torch.frombuffer(numbers, dtype=torch.int64).view(-1, 4),
            torch.frombuffer(tables, dtype=torch.int32),
            longest,
            is_all=len(numbers) == 4 * len(self._chunks),
        )

    def _make_groups(self, visibility: Visibility, longer_than: int) -> list[Group]:
        groups = []
        short: dict[int, list[tuple[int, int]]] = {}
        for index, chunk in enumerate(self._chunks):
            if chunk.num_tokens <= longer_than:
                continue
            num_pages = len(chunk.pages) - visibility.first_key(chunk.start) // self._page_size
            if chunk.num_tokens <= MAX_GROUPED_TOKENS and num_pages <= self._max_grouped_pages:
                short.setdefault(chunk.num_tokens, []).append((num_pages, index))
            else:
                groups.append(self._single(index, visibility))
        for sized in short.values():
            sized.sort()
            while sized:
                limit = sized[0][0] * _MAX_PADDING
                count = next((i for i, (size, _) in enumerate(sized) if size > limit), len(sized))
                members, sized = sorted(index for _, index in sized[:count]), sized[count:]
                if len(members) == 1:
                    groups.append(self._single(members[0], visibility))
                else:
                    groups.append(self._several(members, visibility))
        return groups

    def _single(self, index: int, visibility: Visibility) -> Group:
        chunk = self._chunks[index]
        offset, start, end = self._offsets[index], chunk.start, chunk.end
        first = visibility.first_key(start)
        is_fresh = start == 0
        mask = None
        if chunk.num_tokens > 1 and not (is_fresh and visibility.first_key(end - 1) == 0):
            mask = _mask(
                torch.arange(start, end, device=self._device)[None, :, None],
                torch.arange(first, end, device=self._device)[None, None, :],
                visibility,
            )
        tokens = slice(offset, offset + chunk.num_tokens)
        if is_fresh:
            return Group(1, chunk.num_tokens, tokens, True, None, None, None, mask)
        first_page = first // self._page_size
        skip, pages = first - first_page * self._page_size, chunk.pages[first_page:]
        keys = slice(skip, skip + end - first)
        if pages == array("i", range(pages[0], pages[0] + len(pages))):
            base = pages[0] * self._page_size
            slots = slice(base + keys.start, base + keys.stop)
            return Group(1, chunk.num_tokens, tokens, False, slots, None, None, mask)
        table = integers(pages, self._device)
        return Group(1, chunk.num_tokens, tokens, False, None, table, keys, mask)

    def _several(self, members: list[int], visibility: Visibility) -> Group:
        size, num_tokens = self._page_size, self._chunks[members[0]].num_tokens
        chunks = [self._chunks[index] for index in members]
        first_pages = [visibility.first_key(chunk.start) // size for chunk in chunks]
        tables = [chunk.pages[first:] for chunk, first in zip(chunks, first_pages, strict=True)]
        num_pages = max(map(len, tables))
        pages = integers(self._padded(tables, num_pages), self._device)
        starts = array("q", (chunk.start for chunk in chunks))
        starts.extend(first * size for first in first_pages)
        numbers = integers(starts, self._device).view(2, -1)
        queries_BT1 = (
            numbers[0, :, None, None] + torch.arange(num_tokens, device=self._device)[:, None]
        )
        keys_B1S = numbers[1, :, None, None] + torch.arange(num_pages * size, device=self._device)
        mask = _mask(queries_BT1, keys_B1S, visibility)
        tokens = self._token_index(members, num_tokens)
        return Group(len(members), num_tokens, tokens, False, None, pages, None, mask)

    def _token_index(self, members: list[int], num_tokens: int) -> slice | torch.Tensor:
        offsets = [self._offsets[index] for index in members]
        first, count = offsets[0], len(members)
        if offsets == list(range(first, first + count * num_tokens, num_tokens)):
            return slice(first, first + count * num_tokens)
        starts = integers(array("q", offsets), self._device)[:, None]
        return (starts + torch.arange(num_tokens, device=self._device)).flatten()


def _mask(queries: torch.Tensor, keys: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    mask = keys <= queries
    if visibility.chunk is not None:
        mask &= keys >= queries - queries % visibility.chunk
    elif visibility.window is not None:
        mask &= keys > queries - visibility.window
    return mask
