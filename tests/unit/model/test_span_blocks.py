"""Spans: parts of them, their caches, what they cache, and state that must not leak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from planetserve.errors import ConfigError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import KvShape, SpanBlocks, SpanCache
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan


def load(folder: Path, start: int, end: int) -> SpanBlocks:
    return SpanBlocks.load(Checkpoint.open(str(folder)), BlockSpan(start, end), torch.float32)


def hidden(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def positions(start: int, end: int) -> torch.Tensor:
    return torch.arange(start, end)[None]


@torch.inference_mode()
def test_layer_outputs_are_the_local_models(llama: Path) -> None:
    local = AutoModelForCausalLM.from_pretrained(llama)
    states = local(torch.arange(3, 11)[None], output_hidden_states=True).hidden_states
    out = load(llama, 1, 3).run(states[1], positions(0, 8))
    torch.testing.assert_close(out, states[3], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_part_of_a_span_equals_a_span_of_that_part(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "gemma2")
    wide, x = load(folder, 0, 4), hidden(9)
    for start, end in ((1, 3), (0, 1), (3, 4), (0, 4), (1, 3)):
        narrow = load(folder, start, end)
        expected = narrow.run(x, positions(0, 9), narrow.make_cache())
        cache = wide.make_cache(BlockSpan(start, end))
        assert torch.equal(wide.run(x, positions(0, 9), cache, span=cache.span), expected)
        assert len(cache.layers) == end - start


def test_blocks_that_are_not_loaded_are_refused(llama: Path) -> None:
    blocks = load(llama, 1, 3)
    with pytest.raises(ConfigError, match="not within 1:3"):
        blocks.run(hidden(2), positions(0, 2), span=BlockSpan(0, 2))
    with pytest.raises(ConfigError, match="has 4 blocks"):
        load(llama, 2, 5)


@torch.inference_mode()
def test_truncating_a_cache_rolls_back(llama: Path) -> None:
    blocks = load(llama, 2, 4)
    cache, x = blocks.make_cache(), hidden(8)
    expected = blocks.run(x[:, :6], positions(0, 6), cache)[:, 4:]
    blocks.run(hidden(3, seed=1), positions(6, 9), cache)
    cache.truncate(4)
    assert cache.get_seq_length() == 4
    again = blocks.run(x[:, 4:6], positions(4, 6), cache)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)
    cache.truncate(9)
    assert cache.get_seq_length() == 6
    cache.truncate(0)
    assert cache.get_seq_length() == 0


@torch.inference_mode()
def test_two_sessions_do_not_see_each_other(llama: Path) -> None:
    blocks = load(llama, 0, 2)
    first, second, x = blocks.make_cache(), blocks.make_cache(), hidden(6)
    blocks.run(x[:, :4], positions(0, 4), first)
    blocks.run(hidden(3, seed=2), positions(0, 3), second)
    out = blocks.run(x[:, 4:], positions(4, 6), first)
    torch.testing.assert_close(out, blocks.run(x, positions(0, 6))[:, 4:], atol=1e-4, rtol=0)


def test_a_layer_outside_the_span_is_answered_by_the_first(llama: Path) -> None:
    cache = SpanCache(BlockSpan(2, 4))
    keys = torch.zeros(1, 2, 5, 8)
    cache.update(keys, keys, 2)
    assert [cache.get_seq_length(index) for index in (0, 2, 3)] == [5, 5, 0]
    assert cache.get_mask_sizes(3, 0) == (8, 0)


@pytest.mark.parametrize("family", ["llama_dynamic_rope", "phi3_longrope"])
@torch.inference_mode()
def test_rotary_state_of_one_session_does_not_reach_the_next(family: str, tmp_path: Path) -> None:
    blocks = load(make_tiny_checkpoint(tmp_path, family), 0, 2)
    assert blocks.constant_rotary_length is not None
    fresh = blocks.run(hidden(10), positions(0, 10))
    blocks.run(hidden(40), positions(0, 40))
    assert torch.equal(blocks.run(hidden(10), positions(0, 10)), fresh)
    assert load(make_tiny_checkpoint(tmp_path / "plain"), 0, 1).constant_rotary_length is None


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", KvShape(2, 8, 8)),
        ("llama_mqa_tied", KvShape(1, 8, 8)),
        ("deepseek_v3", KvShape(1, 16, 4)),
    ],
)
def test_kv_shapes_are_what_the_layers_cache(family: str, shape: KvShape, tmp_path: Path) -> None:
    assert load(make_tiny_checkpoint(tmp_path, family), 1, 3).kv_shapes() == [shape, shape]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "olmo3"])
@torch.inference_mode()
def test_extra_arguments_reach_the_chosen_attention(family: str, tmp_path: Path) -> None:
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, attention_mask, kwargs.pop("marker", None)))
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    AttentionInterface.register("test_attention", attention)
    blocks = load(make_tiny_checkpoint(tmp_path, family), 1, 3)
    blocks.set_attention("test_attention")
    blocks.run(hidden(4), positions(0, 4), span=BlockSpan(2, 3), marker="m")
    blocks.run(hidden(4), positions(0, 4), marker="m")
    assert seen == [(2, None, "m"), (1, None, "m"), (2, None, "m")]


@torch.inference_mode()
def test_a_failed_pass_leaves_nothing_behind(llama: Path) -> None:
    blocks = load(llama, 1, 3)
    expected = blocks.run(hidden(4), positions(0, 4))
    with pytest.raises(RuntimeError):
        blocks.run(torch.zeros(1, 4, 31), positions(0, 4))
    assert torch.equal(blocks.run(hidden(4), positions(0, 4)), expected)
