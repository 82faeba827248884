"""Every way to call `generate()` gives what the local model gives, token for token in float32."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from planetserve import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    DistributedFalconForCausalLM,
    DistributedLlamaConfig,
)
from planetserve.errors import ConfigError, SessionClosed, SessionLengthError
from planetserve.testing.swarm import LocalSwarm

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def test_greedy_equals_local(model: Any, local: Any, prompt: torch.Tensor) -> None:
    assert torch.equal(model.generate(prompt, **GREEDY), local.generate(prompt, **GREEDY))


def test_left_padded_batch_equals_local(
    model: Any, local: Any, padded: dict[str, torch.Tensor]
) -> None:
    got = model.generate(**padded, **GREEDY, pad_token_id=0)
    assert torch.equal(got, local.generate(**padded, **GREEDY, pad_token_id=0))


def test_sampling_with_a_seed_equals_local(model: Any, local: Any, prompt: torch.Tensor) -> None:
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_k": 20}
    torch.manual_seed(3)
    expected = local.generate(prompt, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(prompt, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 2},
    ],
)
def test_beam_search_equals_local(
    model: Any, local: Any, padded: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    settings = {**GREEDY, **options, "pad_token_id": 0}
    assert torch.equal(model.generate(**padded, **settings), local.generate(**padded, **settings))


def test_return_sequences_equal_local(model: Any, local: Any, prompt: torch.Tensor) -> None:
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    expected = local.generate(prompt, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, **options), expected)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"repetition_penalty": 1.3}])
def test_other_decoding_options(
    model: Any, local: Any, prompt: torch.Tensor, options: dict[str, Any]
) -> None:
    ids = torch.cat([prompt, prompt], dim=1)
    expected = local.generate(ids, **GREEDY, **options)
    assert torch.equal(model.generate(ids, **GREEDY, **options), expected)


def test_assisted_generation_equals_local(model: Any, local: Any, prompt: torch.Tensor) -> None:
    # The model as its own assistant: most candidates are taken, and some steps are rolled back.
    expected = local.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, **GREEDY, assistant_model=local), expected)


class _StopAfter(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria(model: Any, prompt: torch.Tensor) -> None:
    criteria = StoppingCriteriaList([_StopAfter(15), MaxLengthCriteria(20)])
    got = model.generate(prompt, **GREEDY, stopping_criteria=criteria)
    assert got.shape == (1, 15)


class _Forbid(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.token] = -torch.inf
        return scores


def test_logits_processor(model: Any, local: Any, prompt: torch.Tensor) -> None:
    first = int(local.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1])
    processors = LogitsProcessorList([_Forbid(first)])
    got = model.generate(prompt, **GREEDY, logits_processor=processors)
    assert first not in got[0, prompt.shape[1] :].tolist()
    assert torch.equal(got, local.generate(prompt, **GREEDY, logits_processor=processors))


class _Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer_sees_every_token(model: Any, prompt: torch.Tensor) -> None:
    streamer = _Collect()
    got = model.generate(prompt, **GREEDY, streamer=streamer)
    assert streamer.tokens == got[0].tolist()
    assert streamer.ended


def test_generation_without_cache_equals_local(
    model: Any, local: Any, prompt: torch.Tensor
) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    assert torch.equal(model.generate(prompt, **options), local.generate(prompt, **options))


def test_session_continues_token_by_token(model: Any, local: Any, prompt: torch.Tensor) -> None:
    expected = local.generate(prompt, **GREEDY)
    with model.inference_session(max_length=64) as session:
        parts = [
            model.generate(prompt if step == 0 else None, max_new_tokens=1, do_sample=False)
            for step in range(12)
        ]
        # The last token has been sampled but not been fed yet.
        assert session.position == prompt.shape[1] + 11
    assert torch.equal(torch.cat(parts, dim=1), expected)


def test_session_takes_new_tokens_of_a_conversation(
    model: Any, local: Any, prompt: torch.Tensor
) -> None:
    question = prompt[:, :5]
    with model.inference_session(max_length=64):
        first = model.generate(prompt, max_new_tokens=4, do_sample=False)
        second = model.generate(question, max_new_tokens=6, do_sample=False)
    whole = torch.cat([first, question], dim=1)
    expected = local.generate(whole, max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.cat([first, second], dim=1), expected)


def test_session_of_a_padded_batch(model: Any, local: Any, padded: dict[str, torch.Tensor]) -> None:
    expected = local.generate(**padded, **GREEDY, pad_token_id=0)
    with model.inference_session(max_length=64):
        first = model.generate(**padded, max_new_tokens=5, do_sample=False, pad_token_id=0)
        rest = model.generate(None, max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat([first, rest], dim=1), expected)


@pytest.mark.parametrize("taken_back", [1, 3, 7])
@pytest.mark.parametrize("batch", [False, True])
def test_session_takes_back_the_end_of_a_conversation(
    model: Any, local: Any, padded: dict[str, torch.Tensor], taken_back: int, batch: bool
) -> None:
    """Also past the first answer's beginning, with other words or none after it."""
    given = padded if batch else {"input_ids": padded["input_ids"][:1]}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with model.inference_session(max_length=64) as session:
        told = model.generate(**given, **options)
        session.position -= taken_back
        kept = told.shape[1] - 1 - taken_back
        assert session.output_ids is not None
        assert torch.equal(session.output_ids, told[:, :kept])
        again = model.generate(None, **options)
        session.position -= again.shape[1] - 1
        question = told[:, 2:5].clone()
        other = model.generate(question, **options)
        assert session.position == int(mask_of(given, kept + 8).sum(dim=1).max())
    wanted = local.generate(told[:, :kept], attention_mask=mask_of(given, kept), **options)
    assert torch.equal(again, wanted[:, kept:])
    asked = torch.cat([told[:, :kept], question], dim=1)
    wanted = local.generate(asked, attention_mask=mask_of(given, kept + 3), **options)
    assert torch.equal(other, wanted[:, kept:])


def mask_of(given: dict[str, torch.Tensor], num_columns: int) -> torch.Tensor:
    """The mask of a text that begins with `given`."""
    ids = given["input_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    new = mask.new_ones(len(mask), max(0, num_columns - mask.shape[1]))
    return torch.cat([mask, new], dim=1)[:, :num_columns]


def test_session_refuses_what_passes_its_length(model: Any, prompt: torch.Tensor) -> None:
    with model.inference_session(max_length=14) as session:
        with pytest.raises(SessionLengthError, match="max_length=14"):
            model.generate(prompt, max_new_tokens=10, do_sample=False)
    with pytest.raises(SessionClosed):
        model.generate(prompt, session=session, max_new_tokens=1)
    with model.inference_session(max_length=4), pytest.raises(SessionLengthError):
        model.generate(prompt, max_new_tokens=1)


def test_a_default_length_is_cut_to_what_servers_take(
    llama_folder: Path, local: Any, prompt: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Published chat models carry a `max_length` as long as they can be."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with (
        LocalSwarm(str(llama_folder), ["0:6"], {"inference_max_length": 24}) as small,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=small.initial_peers, torch_dtype=torch.float32
        ) as model,
    ):
        model.generation_config.max_length = 131_072
        for extra in ({}, {"num_beams": 2}):
            caplog.clear()
            got = model.generate(prompt, **options, **extra)
            assert torch.equal(got, local.generate(prompt, max_length=24, **options, **extra))
            assert "stops at 24 tokens" in caplog.text
        caplog.clear()
        criteria = StoppingCriteriaList([_StopAfter(15)])
        assert model.generate(prompt, **options, stopping_criteria=criteria).shape == (1, 15)
        assert not caplog.text
        with model.inference_session(max_length=20):
            got = model.generate(prompt, **options)
            assert torch.equal(got, local.generate(prompt, max_length=20, **options))
        with pytest.raises(SessionLengthError, match="longer than this swarm's servers take"):
            model.generate(prompt, max_new_tokens=100, **options)


def test_forward_gives_local_logits(
    model: Any, local: Any, prompt: torch.Tensor, padded: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, local(prompt).logits, atol=1e-4, rtol=1e-4)
        got, expected = model(**padded).logits, local(**padded).logits
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)


def test_a_compiled_model_gives_local_logits(model: Any, local: Any, prompt: torch.Tensor) -> None:
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(prompt).logits
        torch.testing.assert_close(got, local(prompt).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(prompt, **GREEDY), local.generate(prompt, **GREEDY))
    gc.collect()  # the compiler's frames, in a cycle, keep the cache of the call


def test_returned_cache_continues_and_rolls_back(
    model: Any, local: Any, prompt: torch.Tensor
) -> None:
    with torch.no_grad():
        expected = local(prompt).logits
        out = model(prompt[:, :7])
        cache = out.past_key_values
        rest = model(prompt[:, 7:], past_key_values=cache).logits
        torch.testing.assert_close(rest, expected[:, 7:], atol=1e-4, rtol=1e-4)
        cache.crop(-3)
        again = model(prompt[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(again, expected[:, 9:], atol=1e-4, rtol=1e-4)


def test_foreign_cache_is_refused(model: Any, local: Any, prompt: torch.Tensor) -> None:
    cache = local(prompt).past_key_values
    with pytest.raises(ConfigError, match="past_key_values"):
        model(prompt, past_key_values=cache)


def test_model_without_head(
    swarm: LocalSwarm, llama_folder: Path, local: Any, prompt: torch.Tensor
) -> None:
    with (
        AutoDistributedModel.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as headless,
        torch.no_grad(),
    ):
        got = headless(prompt).last_hidden_state
    torch.testing.assert_close(got, local.model(prompt).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_class_of_another_family_refuses(swarm: LocalSwarm, llama_folder: Path) -> None:
    assert DistributedLlamaConfig.from_pretrained(str(llama_folder)).model_type == "llama"
    with pytest.raises(ConfigError, match="loads falcon models"):
        DistributedFalconForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        )


def test_session_steps_by_hand(model: Any, local: Any, prompt: torch.Tensor) -> None:
    """What Petals calls `sess.step`: hidden states in and out, with rollback by `position`."""
    embedded = local.model.embed_tokens(prompt).detach()
    seen: list[torch.Tensor] = []
    handle = local.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        local(prompt)
    handle.remove()
    with model.inference_session(max_length=20) as session:
        session.step(embedded[:, :9])
        session.position = 5
        rest = session.step(embedded[:, 5:])
    torch.testing.assert_close(rest, seen[0][:, 5:], atol=1e-4, rtol=1e-4)


def test_chain_tiles_the_model(model: Any, prompt: torch.Tensor) -> None:
    model.generate(prompt, max_new_tokens=1)
    hops = model.chain.hops
    assert [hops[0].start, hops[-1].end] == [0, 6]
    assert all(a.end == b.start for a, b in zip(hops, hops[1:], strict=False))
