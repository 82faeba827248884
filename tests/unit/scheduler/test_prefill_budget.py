"""Prompts take what decoding leaves: the budget follows what batches took."""

from __future__ import annotations

import pytest

from planetserve.errors import ConfigError
from planetserve.scheduler.prefill_budget import MIN_TOKENS, MOST_SLOWDOWN, PrefillBudget

MAX = 512
A, B, P = b"a", b"b", b"p"
PROMPT = frozenset({P})


def batch_s(num_decode: int, num_prefill: int) -> float:
    """A machine on which a token more costs a twentieth of a batch."""
    return 0.040 + 0.002 * (num_decode + num_prefill)


def run(
    budget: PrefillBudget,
    now_s: float,
    num_batches: int,
    prompts: frozenset[bytes] = frozenset(),
    writers: tuple[bytes, ...] = (A, B),
) -> tuple[int, float]:
    """Batches of one decode step per writer, with as many prompt tokens as allowed.

    Returns the largest of the last budgets and the time.
    """
    sizes = [0]
    for _ in range(num_batches):
        tokens = budget.tokens(now_s, prompts, len(writers)) if prompts else 0
        work_s = batch_s(len(writers), tokens)
        now_s += work_s
        budget.record(writers, len(writers), tokens, work_s, now_s)
        sizes.append(tokens)
    return max(sizes[-10:]), now_s


def test_alone_a_prompt_gets_whole_batches():
    budget = PrefillBudget(MAX, 1.5)
    assert budget.tokens(0.0, {P}, 0) == MAX
    budget.record((), 0, MAX, 1.0, 1.0)
    assert budget.tokens(1.0, {P}, 0) == MAX


@pytest.mark.parametrize("slowdown", [1.5, 2.0, 3.5])
def test_a_batch_takes_as_long_as_allowed(slowdown):
    budget = PrefillBudget(MAX, slowdown)
    writers = tuple(bytes([i]) for i in range(15))
    _, now_s = run(budget, 0.0, 50, writers=writers)
    tokens, _ = run(budget, now_s, 20, PROMPT, writers)
    assert batch_s(15, tokens) == pytest.approx(slowdown * batch_s(15, 0), rel=0.03)


def test_batches_of_few_and_of_many_writers_are_each_allowed_their_own_time():
    budget = PrefillBudget(MAX, 1.5)
    writers = tuple(bytes([i]) for i in range(15))
    _, now_s = run(budget, 0.0, 50, writers=writers[:7])
    for _ in range(5):
        for some in (writers[:3], writers):
            tokens, now_s = run(budget, now_s, 5, PROMPT, some)
    for some in (writers[:3], writers):
        tokens = budget.tokens(now_s, PROMPT, len(some))
        assert batch_s(len(some), tokens) == pytest.approx(1.5 * batch_s(len(some), 0), rel=0.03)


def test_while_writers_are_with_their_clients_a_prompt_gets_the_time_of_a_batch():
    budget = PrefillBudget(MAX, 1.5)
    _, now_s = run(budget, 0.0, 5)
    _, now_s = run(budget, now_s, 5, PROMPT)
    tokens = budget.tokens(now_s, PROMPT, 0)
    assert batch_s(0, tokens) == pytest.approx(1.5 * batch_s(2, 0), rel=0.03)


def test_a_prompt_is_never_starved():
    budget = PrefillBudget(MAX, 1.01)
    writers = tuple(bytes([i]) for i in range(150))
    _, now_s = run(budget, 0.0, 5, writers=writers)
    tokens, _ = run(budget, now_s, 50, PROMPT, writers)
    assert tokens == MIN_TOKENS
    assert PrefillBudget(2, 1.5).tokens(0.0, {P}, 0) == 2


def test_where_many_wait_and_few_write_the_few_wait_longer_within_limits():
    for num_prompts in (1, 2, 4, 8, 30):
        budget = PrefillBudget(MAX, 1.5)
        prompts = frozenset(bytes([3, i]) for i in range(num_prompts))
        _, now_s = run(budget, 0.0, 5)
        tokens, _ = run(budget, now_s, 20, prompts)
        ratio = batch_s(2, tokens) / batch_s(2, 0)
        expected = min(max(1.5, 1 + num_prompts / 2), MOST_SLOWDOWN)
        assert ratio == pytest.approx(expected, rel=0.03)


def test_a_machine_on_which_tokens_cost_nothing_gives_whole_batches():
    budget = PrefillBudget(MAX, 1.5)
    for prompt_tokens in (0, 0, 32, MAX):
        budget.record((A,), 1, prompt_tokens, 0.05, 1.0)
    assert budget.tokens(1.0, {P}, 1) == MAX


def test_decode_steps_alone_are_timed_again_while_a_prompt_is_computed():
    budget = PrefillBudget(MAX, 1.5)
    _, now_s = run(budget, 0.0, 5)
    sizes = []
    for _ in range(200):
        sizes.append(budget.tokens(now_s, PROMPT, 2))
        now_s += batch_s(2, sizes[-1])
        budget.record((A, B), 2, sizes[-1], batch_s(2, sizes[-1]), now_s)
    assert 2 <= sizes.count(0) <= 5


def test_decoding_that_ended_no_longer_counts():
    budget = PrefillBudget(MAX, 1.5)
    _, now_s = run(budget, 0.0, 5)
    assert budget.tokens(now_s, {P}, 0) < MAX
    assert budget.tokens(now_s + 60.0, {P}, 0) == MAX
    budget.forget(A)
    assert budget.tokens(now_s, {P}, 0) < MAX
    assert budget.tokens(now_s, {P, B}, 0) == MAX  # the next prompt of the session that decoded
    budget.forget(B)
    assert budget.tokens(now_s, {P}, 0) == MAX


def test_without_a_baseline_the_next_batch_is_of_decode_steps_alone():
    budget = PrefillBudget(MAX, 1.5)
    assert budget.tokens(0.0, {P}, 1) == MAX
    budget.record((A,), 1, 32, 10.0, 10.0)
    assert MIN_TOKENS < budget.tokens(10.0, {P}, 0) < MAX
    assert budget.tokens(10.0, {P}, 1) == 0
    budget.record((A,), 1, 0, 0.05, 10.05)
    assert MIN_TOKENS < budget.tokens(10.05, {P}, 1) < MAX


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError):
        PrefillBudget(0, 1.5)
    with pytest.raises(ConfigError):
        PrefillBudget(8, 1.0)
