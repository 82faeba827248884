"""Attention over pages against a plain loop over tokens, for every way in which pages are read."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from planetserve.engine import sdpa
from planetserve.engine.attention import BACKENDS as REGISTRY
from planetserve.engine.attention import AttentionOptions
from planetserve.engine.kv_cache import PagedKvCache
from planetserve.engine.ragged import RaggedBatch, Visibility
from planetserve.native import library
from planetserve.scheduler.batch import ScheduledChunk

PAGE_SIZE = 4
NUM_PAGES = 96
KEY_WIDTH = 6
VALUE_WIDTH = 5

BACKENDS = [
    "sdpa",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(library.kernels() is None, reason="no kernels were compiled"),
    ),
]


def make_chunk(start: int, num_tokens: int, pages: list[int]) -> ScheduledChunk:
    slots = [
        pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        for position in range(start, start + num_tokens)
    ]
    return ScheduledChunk(0, b"", 0, start, num_tokens, 0, array("i", pages), array("q", slots))


def naive(query_HD, keys_SKD, values_SKE, position, options: AttentionOptions) -> torch.Tensor:
    """One token's output `[H, E]`: straight from the definition, in float64."""
    first = options.visibility.first_key(position)
    shared = query_HD.shape[0] // keys_SKD.shape[1]
    scaling = options.scaling or query_HD.shape[1] ** -0.5
    outputs = []
    for head in range(query_HD.shape[0]):
        keys = keys_SKD[first : position + 1, head // shared].double()
        values = values_SKE[first : position + 1, head // shared].double()
        logits = keys @ query_HD[head].double() * scaling
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        weights = logits.exp()
        total = weights.sum()
        if options.sinks_H is not None:
            total = total + options.sinks_H[head].double().exp()
        outputs.append((weights / total) @ values)
    return torch.stack(outputs).float()


OPTIONS = {
    "full": AttentionOptions(Visibility()),
    "scaled": AttentionOptions(Visibility(), scaling=0.9),
    "window": AttentionOptions(Visibility(window=7)),
    "one_token_window": AttentionOptions(Visibility(window=1)),
    "chunk": AttentionOptions(Visibility(chunk=8)),
    "softcap": AttentionOptions(Visibility(), softcap=1.5),
    "softcap_window": AttentionOptions(Visibility(window=7), softcap=1.5),
    "sinks": AttentionOptions(Visibility(), sinks_H=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "sinks_window": AttentionOptions(
        Visibility(window=7), sinks_H=torch.tensor([0.5, -1.0, 2.0, 0.0])
    ),
}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("max_grouped_context", [0, 16, 1 << 30])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_piece_attends_to_its_own_past(
    backend, name, max_grouped_context, num_kv_heads, monkeypatch
):
    # The kernels take widths that fill vectors.
    key_width, value_width = (KEY_WIDTH, VALUE_WIDTH) if backend == "sdpa" else (48, 32)
    monkeypatch.setattr(sdpa, "_MAX_LOGITS", 200)  # so that long queries are cut
    rng = random.Random(f"{name} {max_grouped_context} {num_kv_heads}")
    torch.manual_seed(5)
    # Single steps, short steps, fresh prompts and chunks, over neat and scattered page tables.
    shapes = [(9, 1), (10, 1), (0, 1), (30, 1), (11, 3), (5, 3), (0, 3), (0, 21), (6, 17), (13, 2)]
    rng.shuffle(shapes)
    neat, scattered = list(range(NUM_PAGES // 2)), list(range(NUM_PAGES // 2, NUM_PAGES))
    rng.shuffle(scattered)
    chunks, past = [], []
    for start, num_tokens in shapes:
        source = rng.choice([neat, scattered])
        count = -(-(start + num_tokens) // PAGE_SIZE)
        chunks.append(make_chunk(start, num_tokens, [source.pop(0) for _ in range(count)]))
        past.append((start, start + num_tokens))
    cache = PagedKvCache(1, NUM_PAGES, PAGE_SIZE)
    cache.write(
        0,
        torch.arange(NUM_PAGES * PAGE_SIZE),
        torch.randn(NUM_PAGES * PAGE_SIZE, num_kv_heads, key_width),
        torch.randn(NUM_PAGES * PAGE_SIZE, num_kv_heads, value_width),
    )
    total = sum(chunk.num_tokens for chunk in chunks)
    query = torch.randn(1, 4, total, key_width)
    key = torch.randn(1, num_kv_heads, total, key_width)
    value = torch.randn(1, num_kv_heads, total, value_width)
    batch = RaggedBatch(
        chunks, PAGE_SIZE, cache.null_page, max_grouped_context, torch.device("cpu")
    )
    pages = cache.write(0, batch.slots_T, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = REGISTRY.create(backend).attend(query, key, value, pages, batch, OPTIONS[name])
    assert output.shape == (1, total, 4, value_width)
    token = 0
    for chunk, (start, end) in zip(chunks, past, strict=True):
        slots = [chunk.pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(chunk.end)]
        for position in range(start, end):
            expected = naive(
                query[0, :, token],
                pages.keys_NKD[slots],
                pages.values_NKD[slots],
                position,
                OPTIONS[name],
            )
            torch.testing.assert_close(output[0, token], expected, rtol=1e-4, atol=1e-5)
            token += 1


def test_steps_over_contexts_of_one_length_share_a_call():
    chunks = [make_chunk(8, 1, [i * 3, i * 3 + 1, i * 3 + 2]) for i in range(5)]
    batch = RaggedBatch(chunks, PAGE_SIZE, NUM_PAGES, 64, torch.device("cpu"))
    (group,) = batch.groups(Visibility())
    assert group.num_chunks == 5
    assert batch.groups(Visibility()) is batch.groups(Visibility())


def test_a_step_over_consecutive_pages_gathers_nothing():
    batch = RaggedBatch(
        [make_chunk(9, 1, [4, 5, 6])], PAGE_SIZE, NUM_PAGES, 64, torch.device("cpu")
    )
    (group,) = batch.groups(Visibility(window=3))
    assert group.pages is None
    assert group.slots == slice(4 * PAGE_SIZE + 7, 4 * PAGE_SIZE + 10)


def test_pages_are_copied_before_any_is_overwritten():
    cache = PagedKvCache(2, 4, 2)
    for layer in range(2):
        values = torch.arange(8.0)[:, None, None] + 100 * layer
        pages = cache.write(layer, torch.arange(8), values, values)
    cache.copy_pages([(0, 1), (1, 2)])
    assert pages.keys_NKD.flatten().tolist() == [100, 101, 100, 101, 102, 103, 106, 107, 0, 0]
    cache.clear_pages([3])
    assert pages.values_NKD.flatten().tolist()[6:] == [0, 0, 0, 0]
    cache.copy_pages([])
    cache.clear_pages([])
