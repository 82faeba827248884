"""The backend for CUDA on a CPU: torch's operator is replaced by what its documentation says."""

from __future__ import annotations

import logging
import random

import pytest
import torch

from planetserve.engine.attention_selector import MIN_PAGES, TOLERANCE, best_backend, largest_error
from planetserve.engine.native_attention import NativeBackend
from planetserve.engine.probe import Batching, examine
from planetserve.engine.sdpa import SdpaBackend
from planetserve.engine.span_runner import SpanRunner
from planetserve.engine.varlen_attention import VarlenBackend
from planetserve.errors import ConfigError
from planetserve.model.span_blocks import KvShape
from planetserve.native import library
from planetserve.testing.scripts import random_script

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ENOUGH = MIN_PAGES * VarlenBackend.page_multiple


def documented(  # noqa: PLR0913 - as many as torch's
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, scale, window_size, enable_gqa, seqused_k, block_table, num_splits,
):  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` over pages, sequence by sequence, in float32."""
    for numbers in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    count = len(seqused_k)
    assert cu_seq_q.shape == cu_seq_k.shape == (count + 1,)
    assert len(block_table) == count
    assert cu_seq_q[0] == cu_seq_k[0] == 0
    assert cu_seq_k.diff().equal(seqused_k)
    assert (max_q, max_k) == (cu_seq_q.diff().max(), seqused_k.max())
    assert (cu_seq_q[-1], query.stride(-1), num_splits) == (len(query), 1, 1)
    assert key.shape[1] % 256 == 0
    assert block_table.max() < len(key)
    assert enable_gqa == (query.shape[1] != key.shape[2])
    left, right = window_size
    assert right == 0
    output = torch.empty_like(query)
    for number, used in enumerate(seqused_k.tolist()):
        tokens = slice(cu_seq_q[number], cu_seq_q[number + 1])
        queries = query[tokens].float()
        shared = query.shape[1] // key.shape[2]
        keys, values = (
            pool[block_table[number].long()]
            .flatten(0, 1)[:used]
            .float()
            .repeat_interleave(shared, 1)
            for pool in (key, value)
        )
        logits = torch.einsum("thd,shd->hts", queries, keys)
        logits *= query.shape[-1] ** -0.5 if scale is None else scale
        # The last query is where the last key is.
        ahead = torch.arange(used) - torch.arange(used - len(queries), used)[:, None]
        hidden = ahead > right if left == -1 else (ahead > right) | (ahead < -left)
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        output[tokens] = torch.einsum("hts,shd->thd", weights, values).to(query.dtype)
    return output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_trial_finds_no_fault_with_what_is_documented(dtype):
    assert largest_error(VarlenBackend(documented), CPU, dtype, width=64) < TOLERANCE / 4


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_give_what_the_reference_gives(seed):
    script = random_script(random.Random(seed))
    error = largest_error(VarlenBackend(documented), CPU, torch.float16, 16, script)
    assert error < TOLERANCE / 4


def one_more(*args, window_size, **options):
    left = window_size[0]
    return documented(*args, window_size=(left + (left > 0), 0), **options)


def forgets_a_row(*args, seqused_k, **options):
    output = documented(*args, seqused_k=seqused_k, **options)
    output[-1] = float("nan")
    return output


def next_page(*args, block_table, **options):
    return documented(*args, block_table=block_table.roll(1, 0), **options)


@pytest.mark.parametrize("wrong", [one_more, forgets_a_row, next_page])
def test_the_trial_finds_faults(wrong):
    assert not largest_error(VarlenBackend(wrong), CPU, torch.bfloat16, width=64) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "why_not"),
    [
        ("llama", None),
        ("mistral", None),
        ("gpt2", None),
        ("llama4_text", None),  # some layers have chunks
        ("gpt_oss", "no layer has attention that this backend computes"),
        ("gemma2", "no layer has attention that this backend computes"),
    ],
)
def test_spans_are_probed_with_it(tiny, family, why_not):
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return documented(*args, **options)

    blocks = tiny(family).load_span(torch.bfloat16)
    with torch.inference_mode():
        verdict = examine(blocks, 32, torch.bfloat16, CPU, VarlenBackend(counted))
    assert (verdict.why_not_ragged is None) == (why_not is None)
    assert (why_not or "") in (verdict.why_not_ragged or "")
    assert bool(calls) == (why_not is None)


def test_a_backend_that_fails_is_replaced_by_the_reference(tiny, caplog):
    # Torch has the operator, and no CPU can run it.
    blocks = tiny("llama").load_span(torch.bfloat16)
    with caplog.at_level(logging.INFO, "planetserve.engine"):
        runner = SpanRunner(blocks, 4, 16, attention_backend="varlen")
    assert runner.batching is Batching.RAGGED
    assert (runner.num_pages, runner.page_size) == (4, 16)
    assert "attention backend sdpa: with VarlenBackend, its code fails" in caplog.text


def test_pages_become_as_large_as_the_backend_needs(tiny, monkeypatch):
    monkeypatch.setattr(SdpaBackend, "page_multiple", 24)
    runner = SpanRunner(tiny("llama").load_span(), 32, 16, attention_backend="sdpa")
    assert (runner.num_pages, runner.page_size) == (21, 24)


@pytest.mark.parametrize(
    ("dtype", "shape", "cache_tokens", "reason"),
    [
        (torch.float32, KvShape(2, 64, 64), ENOUGH, "does not take float32 heads"),
        (torch.bfloat16, KvShape(2, 60, 60), ENOUGH, "heads of this width"),
        (torch.bfloat16, KvShape(1, 64, 32), ENOUGH, "heads of this width"),
        (torch.bfloat16, KvShape(2, 64, 64), ENOUGH - 1, "at least 64 pages of 256 tokens"),
        pytest.param(
            torch.bfloat16, KvShape(2, 64, 64), ENOUGH, "varlen fails on cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it would work here"),
        ),
    ],
)  # fmt: skip
def test_the_log_says_why_not(dtype, shape, cache_tokens, reason, caplog):
    with caplog.at_level(logging.INFO, "planetserve.engine"):
        backend = best_backend(CUDA, dtype, [shape], cache_tokens)
    assert isinstance(backend, SdpaBackend)
    assert reason in caplog.text
    assert len(caplog.messages) == 1


def test_nothing_changes_on_a_cpu():
    backend = best_backend(CPU, torch.bfloat16, [KvShape(2, 64, 64)], ENOUGH)
    assert isinstance(backend, NativeBackend if library.kernels() else SdpaBackend)


def test_an_older_torch_is_told(monkeypatch):
    from torch.nn.attention import varlen

    def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError

    monkeypatch.setattr(varlen, "varlen_attn", of_torch_2_10)
    with pytest.raises(ConfigError, match="too old for varlen: no block_table"):
        VarlenBackend()
    monkeypatch.delattr(varlen, "varlen_attn")
    with pytest.raises(ConfigError, match="too old for varlen"):
        VarlenBackend()
