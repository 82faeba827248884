"""Prompts take what decoding leaves: the budget follows what batches took."""

from __future__ import annotations

import pytest

from planetserve.errors import ConfigError
from planetserve.scheduler.chunk_budget import MIN_TOKENS, ChunkBudget

MAX = 512
A, B, P = b"a", b"b", b"p"


def batch_s(num_decode: int, num_prefill: int) -> float:
    """A machine on which a token more costs a twentieth of a batch."""
    return 0.040 + 0.002 * (num_decode + num_prefill)


def run(budget: ChunkBudget, now_s: float, num_batches: int, *, prompt: bool) -> tuple[int, float]:
    """Batches of two decode steps, with as many prompt tokens as allowed; the last budget."""
    tokens = 0
    for _ in range(num_batches):
        tokens = budget.tokens(now_s, {P}) if prompt else 0
        elapsed_s = batch_s(2, tokens)
        now_s += elapsed_s
        budget.record((A, B), tokens, elapsed_s, now_s)
    return tokens, now_s


def test_alone_a_prompt_gets_whole_batches():
    budget = ChunkBudget(MAX, 1.5)
    assert budget.tokens(0.0, {P}) == MAX
    budget.record((), MAX, 1.0, 1.0)
    assert budget.tokens(1.0, {P}) == MAX


def test_it_settles_where_a_batch_takes_as_long_as_allowed():
    budget = ChunkBudget(MAX, 1.5)
    _, now_s = run(budget, 0.0, 50, prompt=False)
    tokens, _ = run(budget, now_s, 50, prompt=True)
    assert batch_s(2, tokens) == pytest.approx(1.5 * batch_s(2, 0), rel=0.15)
    generous = ChunkBudget(MAX, 3.0)
    _, now_s = run(generous, 0.0, 50, prompt=False)
    more, _ = run(generous, now_s, 50, prompt=True)
    assert more > 3 * tokens


def test_a_prompt_is_never_starved():
    budget = ChunkBudget(MAX, 1.01)
    _, now_s = run(budget, 0.0, 5, prompt=False)
    tokens, _ = run(budget, now_s, 50, prompt=True)
    assert tokens == MIN_TOKENS
    assert ChunkBudget(2, 1.5).tokens(0.0, {P}) == 2


def test_decoding_that_ended_no_longer_counts():
    budget = ChunkBudget(MAX, 1.5)
    _, now_s = run(budget, 0.0, 5, prompt=False)
    assert budget.tokens(now_s, {P}) < MAX
    assert budget.tokens(now_s + 60.0, {P}) == MAX
    budget.forget(A)
    assert budget.tokens(now_s, {P}) < MAX
    assert budget.tokens(now_s, {P, B}) == MAX  # the next prompt of the session that decoded
    budget.forget(B)
    assert budget.tokens(now_s, {P}) == MAX


def test_without_a_baseline_nothing_is_concluded():
    budget = ChunkBudget(MAX, 1.5)
    before = budget.tokens(0.0, {P})
    budget.record((A,), 32, 10.0, 10.0)
    assert before == MAX
    assert MIN_TOKENS < budget.tokens(10.0, {P}) < MAX


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError):
        ChunkBudget(0, 1.5)
    with pytest.raises(ConfigError):
        ChunkBudget(8, 1.0)
