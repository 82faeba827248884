"""Sampling: against transformers' processors, and by counting what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from planetserve.errors import PlanetServeError
from planetserve.gateway.sampling import RowSampling, SamplingParams, prompt_logprobs, sample
from planetserve.gateway.text import Row, TextRequest

VOCAB = 50
PROMPT = [3, 7, 7, 11]


def row(stop_ids: frozenset[int] = frozenset(), **params: Any) -> RowSampling:
    return RowSampling(SamplingParams(**params), PROMPT, stop_ids)


def logits(num_rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draw_many(params: dict[str, Any], logits_V: torch.Tensor, num: int = 20_000) -> torch.Tensor:
    """Relative frequency of each token."""
    rows = [row(seed=seed, **params) for seed in range(num)]
    found = [one.token for one in sample(logits_V.expand(num, -1), rows)]
    return torch.bincount(torch.tensor(found), minlength=len(logits_V)) / num


def expected(params: dict[str, Any], logits_V: torch.Tensor) -> torch.Tensor:
    """The distribution that `generate()` draws from."""
    ids = torch.tensor([PROMPT])
    steps = LogitsProcessorList()
    if "repetition_penalty" in params:
        steps.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if "temperature" in params:
        steps.append(TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        steps.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        steps.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        steps.append(MinPLogitsWarper(params["min_p"]))
    return torch.softmax(steps(ids, logits_V[None].clone()), dim=-1)[0]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
        {"repetition_penalty": 1.8, "top_p": 0.9},
    ],
)
def test_tokens_follow_the_distribution_of_transformers(params: dict[str, Any]) -> None:
    logits_V = logits()[0]
    logits_V[PROMPT] += 2  # so that the penalty matters
    found, wanted = draw_many(params, logits_V), expected(params, logits_V)
    assert not found[wanted == 0].any()
    assert torch.allclose(found, wanted, atol=0.015)


def test_top_p_looks_behind_the_most_likely_tokens_where_these_have_too_little_mass() -> None:
    flat_V = torch.linspace(0, 0.5, 4000)
    wanted = expected({"top_p": 0.9}, flat_V) > 0
    found = draw_many({"top_p": 0.9}, flat_V) > 0
    assert 1024 < int(found.sum())
    assert not (found & ~wanted).any()


def test_temperature_0_takes_the_largest_logit_whatever_else_is_asked() -> None:
    logits_NV = logits(3)
    rows = [row(temperature=0.0), row(temperature=0.0, top_p=0.1), row(temperature=0.0, seed=5)]
    assert [one.token for one in sample(logits_NV, rows)] == logits_NV.argmax(dim=-1).tolist()


def test_a_seed_gives_the_same_tokens_alone_and_among_others() -> None:
    steps = [logits(seed=step) for step in range(20)]
    alone = row(seed=4, top_p=0.9)
    wanted = [sample(step, [alone])[0].token for step in steps]
    again, others = row(seed=4, top_p=0.9), [row(), row(temperature=0.0), row(top_k=3)]
    found = [sample(step.expand(4, -1), [*others, again])[3].token for step in steps]
    assert found == wanted
    other = row(seed=5, top_p=0.9)
    assert [sample(step, [other])[0].token for step in steps] != wanted


def test_penalties_count_generated_tokens_by_their_definition() -> None:
    text = row(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    even_V = torch.zeros(1, VOCAB)
    for token in (9, 9, 4):
        text.take(token)
    raised = even_V.clone()
    raised[0, [9, 4, 3]] = torch.tensor([1.0, 0.75, 0.0])
    raised[0, 20] = 0.005
    # 9: 1 - 0.5 - 2 * 0.25 = 0; 4: 0.75 - 0.5 - 0.25 = 0; 3, of the prompt, is not penalised.
    assert sample(raised, [text])[0].token == 20


def test_logit_bias_and_min_tokens() -> None:
    logits_NV = logits(2)
    best = int(logits_NV[0].argmax())
    biased = row(temperature=0.0, logit_bias={13: 100.0})
    patient = row(frozenset({int(logits_NV[1].argmax())}), temperature=0.0, min_tokens=1)
    tokens = [one.token for one in sample(logits_NV, [biased, patient])]
    assert tokens[0] == 13 != best
    assert tokens[1] == int(logits_NV[1].argsort(descending=True)[1])
    assert sample(logits_NV[1:], [patient])[0].token == int(logits_NV[1].argmax())


def test_logprobs_are_those_of_the_model_before_anything_is_changed() -> None:
    logits_NV = logits()
    one = sample(logits_NV, [row(temperature=0.0, logit_bias={13: 100.0}, logprobs=3)])[0]
    wanted_V = torch.log_softmax(logits_NV[0], dim=-1)
    assert one.logprob is not None
    assert one.logprob.logprob == pytest.approx(float(wanted_V[13]))
    values, ids = wanted_V.topk(3)
    assert [token for token, _ in one.logprob.top] == ids.tolist()
    assert [value for _, value in one.logprob.top] == pytest.approx(values.tolist())


def test_logprob_of_the_best_token_is_bit_equal_to_the_first_of_the_top() -> None:
    logits_NV = logits(4)
    for one in sample(logits_NV, [row(temperature=0.0, logprobs=1) for _ in range(4)]):
        assert one.logprob is not None
        assert (one.token, one.logprob.logprob) == one.logprob.top[0]
    for token, found in enumerate(prompt_logprobs(logits_NV, [0, 1, 2, 3], 1)):
        assert found.token == token
        assert found.logprob <= found.top[0][1]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"temperature": 0.0}, {"logprobs": 2}])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_fail_their_own_text_only(
    params: dict[str, Any], bad: float
) -> None:
    logits_NV = logits(3)
    wanted = sample(logits_NV, [row(seed=seed, **params) for seed in (1, 7, 2)])
    logits_NV[1, 5] = bad
    found = sample(logits_NV, [row(seed=seed, **params) for seed in (1, 7, 2)])
    assert [one.is_finite for one in found] == [True, False, True]
    assert [found[0].token, found[2].token] == [wanted[0].token, wanted[2].token]
    assert 0 <= found[1].token < VOCAB  # it is embedded with the others
    tokenizer = Tokenizer(WordLevel({"a": 0}))
    text = TextRequest(prompt_ids=[0], sampling=SamplingParams(), max_tokens=3)
    with pytest.raises(PlanetServeError, match="not finite"):
        Row(0, 0, text, tokenizer).add(found[1])


def test_the_most_likely_token_stays_however_small_top_p_is() -> None:
    logits_NV = logits()
    found = sample(logits_NV, [row(top_p=5e-324)])
    assert found[0].token == int(logits_NV[0].argmax())
