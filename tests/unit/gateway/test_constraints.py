"""Grammars: which tokens may come, which must, and what is too much."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import planetserve
from planetserve.gateway.constraints import Constraint, Format, Grammars
from planetserve.gateway.errors import RequestError
from planetserve.gateway.sampling import RowSampling, SamplingParams, sample

TOKENIZER = Tokenizer.from_file(
    str(Path(planetserve.__path__[0]) / "demo_model" / "tokenizer.json")
)
VOCAB = 4100
"""A little more than the tokenizer's, as models have it."""
EOS = 2


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    made = Grammars(TOKENIZER, VOCAB, [EOS])
    yield made
    made.close()


def row(constraint: Constraint, **params: object) -> RowSampling:
    return RowSampling(SamplingParams(temperature=1.0, **params), [1], frozenset(), constraint)  # type: ignore[arg-type]


async def test_only_what_a_grammar_allows_is_chosen(grammars: Grammars) -> None:
    matcher = await grammars.compile(Format("regex", "(aa|bb)c+", "x"))
    for seed in range(5):
        rows = [row(Constraint(matcher.deep_copy()), seed=seed), RowSampling(
            SamplingParams(temperature=0), [1], frozenset())]  # fmt: skip
        tokens = []
        while len(tokens) < 6:
            logits_NV = torch.randn(2, VOCAB)
            first, second = sample(logits_NV.clone(), rows)
            assert second.token == int(logits_NV[1].argmax())  # of another text
            tokens += first.tokens
        text = TOKENIZER.decode([token for token in tokens if token != EOS])
        assert text.startswith(("aac", "bbc"))
        assert set(text[2:]) == {"c"}


async def test_forced_tokens_come_at_once_unless_they_are_to_be_shown(grammars: Grammars) -> None:
    matcher = await grammars.compile(Format("choice", '["list of lists", "no"]', "x"))
    logits_V = torch.zeros(VOCAB)
    logits_V[TOKENIZER.token_to_id("l")] = 50
    logits_V[TOKENIZER.encode("list").ids[-1]] = 100
    for logprobs in (None, 1):
        constraint = Constraint(matcher.deep_copy())
        (found,) = sample(logits_V[None].clone(), [row(constraint, logprobs=logprobs)])
        if logprobs is None:
            assert TOKENIZER.decode(list(found.tokens)) == "list of lists"
            assert constraint.is_done
        else:
            assert found.forced == ()
            assert not constraint.is_done


async def test_reasoning_comes_first_and_is_not_bound(grammars: Grammars) -> None:
    matcher = await grammars.compile(Format("regex", "a", "x"))
    constraint = Constraint(matcher.deep_copy(), reasoning_id=7)
    logits_V = torch.zeros(VOCAB)
    constraint.allow(logits_V)
    assert {7, TOKENIZER.token_to_id("a")} == set(logits_V.isfinite().nonzero()[:, 0].tolist())
    constraint.take(7)
    assert not constraint.is_active
    constraint.take(9)
    constraint.is_active = True
    logits_V = torch.zeros(VOCAB)
    constraint.allow(logits_V)
    assert not logits_V[7].isfinite()
    constraint.check()


async def test_what_does_not_follow_fails_its_own_text(grammars: Grammars) -> None:
    matcher = await grammars.compile(Format("regex", "a", "x"))
    constraint = Constraint(matcher.deep_copy())
    constraint.take(TOKENIZER.token_to_id("b"))
    logits_V = torch.zeros(VOCAB)
    constraint.allow(logits_V)
    assert bool(logits_V.isfinite().all())
    with pytest.raises(RequestError):
        constraint.check()


async def test_compiled_grammars_are_kept_up_to_a_number(grammars: Grammars) -> None:
    first = await grammars.compile(Format.of_schema({"const": 0}, "x"))
    assert await grammars.compile(Format.of_schema({"const": 0}, "x")) is first
    for number in range(1, 17):
        await grammars.compile(Format.of_schema({"const": number}, "x"))
    assert await grammars.compile(Format.of_schema({"const": 0}, "x")) is not first


async def test_a_model_without_an_end_of_text_has_formats_too() -> None:
    grammars = Grammars(TOKENIZER, VOCAB, [])
    matcher = await grammars.compile(Format("regex", "a", "x"))
    constraint = Constraint(matcher.deep_copy())
    constraint.take(TOKENIZER.token_to_id("a"))
    assert constraint.is_done
    grammars.close()


async def test_a_tokenizer_that_cannot_be_guided_refuses_formats() -> None:
    grammars = Grammars(Tokenizer(WordLevel({"a": 0, "b": 1})), 2, [1])
    with pytest.raises(RequestError, match="x is not usable"):
        await grammars.compile(Format("regex", "a", "x"))
    grammars.close()
