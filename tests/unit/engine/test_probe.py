"""The load-time probe: it lets through what is right and finds what is not."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import SPAN

from planetserve.engine import attention, padded_runner
from planetserve.engine.padded import PaddedBatch
from planetserve.engine.probe import Batching, agree, examine
from planetserve.engine.ragged import Visibility
from planetserve.engine.sdpa import SdpaBackend
from planetserve.engine.span_runner import SpanRunner
from planetserve.errors import ConfigError, ModelError


class BlindToOptions(SdpaBackend):
    """Attends as if some option had not been given."""

    def __init__(self, **changed):
        self.changed = changed

    def attend(self, query, key, value, pages, batch, options):
        fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
        options = attention.AttentionOptions(**{**fields, **self.changed})
        return super().attend(query, key, value, pages, batch, options)


class LeakyBackend(SdpaBackend):
    """Lets the sequences of a batch see each other's tokens."""

    def attend(self, query, key, value, pages, batch, options):
        output = super().attend(query, key, value, pages, batch, options)
        return output + 0.01 * output.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("family", "backend", "fits"),
    [
        ("llama", SdpaBackend(), True),
        ("llama", LeakyBackend(), False),
        ("llama", BlindToOptions(scaling=0.5), False),
        ("mistral", SdpaBackend(), True),
        ("mistral", BlindToOptions(visibility=Visibility()), False),
        ("gemma2", SdpaBackend(), True),
        ("gemma2", BlindToOptions(softcap=None), False),
        ("gpt_oss", SdpaBackend(), True),
        ("gpt_oss", BlindToOptions(sinks_H=None), False),
        ("llama4_text", SdpaBackend(), True),
        ("llama4_text", BlindToOptions(visibility=Visibility()), False),
    ],
)
def test_a_wrong_attention_is_found(tiny, family, backend, fits):
    blocks = tiny(family).load_span()
    with torch.inference_mode():
        verdict = examine(blocks, 32, torch.float32, torch.device("cpu"), backend)
    assert (verdict.why_not_ragged is None) == fits
    assert blocks.base.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("stablelm", "does not pass arguments on"),
        ("bloom", "0 calls of the paged attention from 2 layers"),
    ],
)
def test_the_log_says_why_a_span_is_padded(tiny, family, reason, caplog):
    with caplog.at_level(logging.INFO, "planetserve.engine"):
        runner = SpanRunner(tiny(family).load_span(), 4, 16)
    assert runner.batching is Batching.PADDED
    assert "runs sessions as padded rows" in caplog.text
    assert reason in caplog.text
    assert runner.can_preempt


class Leftmost(PaddedBatch):
    """Says that the padding is on the right."""

    def __init__(self, *args):
        super().__init__(*args)
        if self.mask_BS is not None:
            self.mask_BS = self.mask_BS.flip(1)


class OtherRows(PaddedBatch):
    """Gives rows the keys of other rows."""

    def all_tokens(self, *args):
        return super().all_tokens(*args).flip(0)


@pytest.mark.parametrize("mistaken", [Leftmost, OtherRows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["falcon_mqa", "bloom"])
def test_wrong_rows_are_found_and_the_log_says_why(
    tiny, family, dtype, mistaken, monkeypatch, caplog
):
    monkeypatch.setattr(padded_runner, "PaddedBatch", mistaken)
    with caplog.at_level(logging.INFO, "planetserve.engine"):
        runner = SpanRunner(tiny(family).load_span(dtype), 4, 16)
    assert runner.batching is Batching.PLAIN
    assert not runner.can_preempt
    assert "runs one sequence per pass" in caplog.text
    assert "padded and single passes differ" in caplog.text


def test_a_span_whose_rotary_follows_the_length_is_not_chunkable(tiny):
    runner = SpanRunner(tiny("llama_dynamic_rope").load_span(), 4, 16)
    assert runner.batching is Batching.RAGGED
    assert not runner.chunkable
    assert not runner.can_preempt


def test_a_window_longer_than_the_probe_must_be_passed_as_an_argument(tiny):
    blocks = tiny("llama").load_span()
    for layer in blocks.layers:
        layer.self_attn.config.sliding_window = 4096
    with torch.inference_mode():
        verdict = examine(blocks, 32, torch.float32, torch.device("cpu"), SdpaBackend())
    assert "sliding_window=None" in verdict.why_not_ragged


def test_unknown_attention_arguments_are_refused(tiny):
    module = tiny("llama").load_span().layers[0].self_attn
    for arguments in ({"position_bias": torch.zeros(1)}, {"indices": [1]}, {"is_causal": False}):
        with pytest.raises(attention.UnsupportedAttention):
            attention._read_options(module, arguments)
    assert attention._read_options(module, {"is_causal": True, "position_ids": torch.zeros(1)})


def test_agreement_is_measured_against_what_the_span_adds():
    hidden = torch.full((4, 8), 100.0)
    expected = hidden + 1.0
    assert agree(expected + 5e-5, expected, hidden)
    assert not agree(expected + 1e-3, expected, hidden)


def test_cache_bytes_and_unknown_backend(tiny):
    blocks = tiny("llama").load_span()
    assert SpanRunner(blocks, 4, 16).bytes_per_token == len(SPAN) * 2 * 2 * 8 * 4
    with pytest.raises(ConfigError, match="sdpa"):
        SpanRunner(blocks, 4, 16, attention_backend="magic")


@pytest.mark.parametrize(
    ("dtype", "scale", "message"),
    [
        (torch.float16, 3e3, r"blocks 1:3 .* float16 \(overflow.*bfloat16 or float32"),
        (torch.float16, float("inf"), r"mlp.* of block 2 reaches past the range of float16"),
        (torch.bfloat16, float("nan"), r"mlp.* of block 2 holds NaN or inf; download"),
        (torch.float32, float("inf"), r"mlp.* of block 2 holds NaN or inf; download"),
        (torch.float32, 1e30, r"blocks 1:3 .* give NaN or inf in float32"),
    ],
)
def test_numbers_out_of_range_are_told_from_a_wrong_cache(tiny, dtype, scale, message):
    blocks = tiny("llama").load_span(dtype)
    with torch.no_grad():
        for value in blocks.layers[1].mlp.parameters():
            value.mul_(scale)
    with torch.inference_mode(), pytest.raises(ModelError, match=message) as error:
        examine(blocks, 32, dtype, torch.device("cpu"), SdpaBackend())
    assert "whole pass" not in str(error.value)


def test_one_token_out_of_range_is_not_outvoted(tiny):
    """In half precision most tokens decide whether results agree."""
    blocks = tiny("llama").load_span(torch.bfloat16)
    run = blocks.run

    def overflow_once(hidden_1TD, *args, **kwargs):
        output = run(hidden_1TD, *args, **kwargs).clone()
        output[:, 5:6] = float("inf")
        return output

    blocks.run = overflow_once
    with torch.inference_mode(), pytest.raises(ModelError, match="NaN or inf"):
        examine(blocks, 32, torch.bfloat16, torch.device("cpu"), SdpaBackend())
