"""Turns of a session: in any order of decoding methods each gives what the local model gives.

The local model gets the whole text so far. Rollbacks and turns that fail may lie between.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from planetserve import AutoDistributedModelForCausalLM
from planetserve.client.session import InferenceSession
from planetserve.errors import ConfigError, SessionClosed
from planetserve.testing.swarm import LocalSwarm

COMMON: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": SAMPLED,
    "beams": {"num_beams": 3, **GREEDY},
    "beam sampling": {"num_beams": 3, **SAMPLED},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, **GREEDY},
    "several samples": {"num_return_sequences": 3, **SAMPLED},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, **GREEDY},
    "assistant": {"assistant_model": True, **GREEDY},
    "chunked prompt": {"prefill_chunk_size": 3, **GREEDY},
    "without cache": {"use_cache": False, **GREEDY},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, **GREEDY},
    "as a dict": {"return_dict_in_generate": True, "output_scores": True, **GREEDY},
}
SINGLE = {"prompt lookup", "assistant"}
"""Modes that Hugging Face has for one text only."""
SEVERAL = {"several beams", "several samples"}


class Failing(BaseStreamer):
    """Fails at the third token."""

    def __init__(self) -> None:
        self.num_calls = 0

    def put(self, value: torch.Tensor) -> None:
        self.num_calls += 1
        if self.num_calls > 3:
            raise RuntimeError("the reader has gone")

    def end(self) -> None:
        pass


def run(model: Any, mode: str, local: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    options = {**COMMON, **MODES[mode], **kwargs}
    if options.get("assistant_model"):
        options["assistant_model"] = local
    torch.manual_seed(17)
    result = model.generate(*args, **options)
    return result if isinstance(result, torch.Tensor) else result.sequences


class Talk:
    """A session and the text that it should hold, which the local model goes on with."""

    def __init__(self, model: Any, local: Any, session: InferenceSession):
        self.model, self.local, self.session = model, local, session
        self.text: torch.Tensor | None = None

    def turn(self, mode: str, new: torch.Tensor | None, **kwargs: Any) -> None:
        before = self.text
        whole = new
        if before is not None:
            whole = before
            if new is not None:
                whole = torch.cat([before, new.expand(len(before), -1)], dim=1)
        assert whole is not None
        wanted = run(self.local, mode, self.local, whole, attention_mask=torch.ones_like(whole))
        got = run(self.model, mode, self.local, new, **kwargs)
        num_before = 0 if before is None else before.shape[1]
        assert torch.equal(got, wanted[:, num_before:]), mode
        self.text = wanted
        assert self.session.position == wanted.shape[1] - 1

    def take_back(self, num_tokens: int) -> None:
        assert self.text is not None
        kept = self.session.position - num_tokens
        self.session.position = kept
        self.text = self.text[:, :kept]

    def fail(self, new: torch.Tensor) -> None:
        with pytest.raises(RuntimeError, match="the reader has gone"):
            run(self.model, "greedy", self.local, new, streamer=Failing())


@pytest.fixture
def talk(model: Any, local: Any) -> Any:
    with model.inference_session(max_length=200) as session:
        yield Talk(model, local, session)


def tokens(seed: int, count: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(5, 90, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_every_pair_of_decoding_methods(talk: Talk, first: str, second: str) -> None:
    prompt = tokens(1, 6).repeat(1, 2)
    talk.turn(first, prompt)
    if second in SINGLE and first in SEVERAL:
        with pytest.raises(ValueError, match="batch_size = 1"):
            run(talk.model, second, talk.local, tokens(2, 3))
        talk.turn("greedy", tokens(2, 3))
    else:
        talk.turn(second, tokens(2, 3))
    assert talk.text is not None
    if len(talk.text) < 12:
        talk.turn("greedy", None)


@pytest.mark.parametrize("seed", range(12))
def test_random_turns_rollbacks_and_failures(talk: Talk, seed: int) -> None:
    chooser = random.Random(seed)
    talk.turn(chooser.choice([mode for mode in MODES if mode not in SEVERAL]), tokens(seed, 8))
    for step in range(4):
        new = tokens(100 * seed + step, chooser.randint(1, 4))
        what = chooser.random()
        if what < 0.3:
            talk.take_back(chooser.randint(1, 7))
        elif what < 0.5:
            talk.fail(new)
        else:
            talk.turn(chooser.choice([mode for mode in MODES if mode not in SEVERAL]), new)
    talk.turn("greedy", tokens(seed + 50, 2))


@pytest.mark.parametrize("first", [mode for mode in MODES if mode not in SINGLE])
@pytest.mark.parametrize("second", ["greedy", "beams"])
def test_left_padded_batches(
    model: Any, local: Any, padded: dict[str, torch.Tensor], first: str, second: str
) -> None:
    with model.inference_session(max_length=64):
        got = run(model, first, local, **padded)
        wanted = run(local, first, local, **padded)
        assert torch.equal(got, wanted)
        copies = len(got) // len(padded["input_ids"])
        new = tokens(3, 2, len(got))
        mask = padded["attention_mask"].repeat_interleave(copies, dim=0)
        whole = torch.cat([got, new], dim=1)
        ones = torch.ones(len(got), whole.shape[1] - mask.shape[1], dtype=mask.dtype)
        mask = torch.cat([mask, ones], dim=1)
        got_next = run(model, second, local, new)
    wanted = run(local, second, local, whole, attention_mask=mask)
    assert torch.equal(got_next, wanted[:, got.shape[1] :])


def test_masks_are_told_from_padding_as_hugging_face_does(
    model: Any, local: Any, padded: dict[str, torch.Tensor]
) -> None:
    ids = padded["input_ids"]
    with model.inference_session(max_length=64):
        first = run(model, "greedy", local, ids, eos_token_id=95)
        second = run(model, "greedy", local, ids[:, -8:], eos_token_id=95)
    wanted = run(local, "greedy", local, ids, eos_token_id=95)
    assert torch.equal(first, wanted)
    whole = torch.cat([wanted, ids[:, -8:]], dim=1)
    wanted = run(local, "greedy", local, whole, eos_token_id=95)
    assert torch.equal(second, wanted[:, first.shape[1] :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds cannot be used inside"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids cannot be used inside"),
        ({"token_healing": True}, "token_healing cannot be used inside"),
        ({"attention_mask": torch.ones(1, 2)}, "fits neither the new tokens"),
    ],
)
def test_what_a_session_cannot_do_is_refused_at_once(
    model: Any, options: dict[str, Any], message: str
) -> None:
    with model.inference_session(max_length=64) as session:
        with pytest.raises(ConfigError, match=message):
            model.generate(tokens(1, 3), max_new_tokens=2, **options)
        assert session.chain is None


def test_new_tokens_fit_the_texts_of_a_session(model: Any) -> None:
    with model.inference_session(max_length=64):
        model.generate(tokens(1, 4, 2), max_new_tokens=2, do_sample=False)
        with pytest.raises(ConfigError, match="holds 2 texts, got new tokens for 3"):
            model.generate(tokens(1, 4, 3), max_new_tokens=2)


def test_step_goes_on_where_generate_has_come_to(model: Any, local: Any) -> None:
    ids = tokens(1, 6, 2)
    hidden = local.model.embed_tokens(ids).detach()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with model.inference_session(max_length=64) as session:
        whole = session.step(hidden)
    for given, expected in ((None, whole[:, 4:]), (mask, whole[1:, 4:])):
        with model.inference_session(max_length=64) as session:
            model.generate(ids[:, :4], attention_mask=given, max_new_tokens=3, do_sample=False)
            session.position = 4
            got = session.step(hidden[:, 4:])
            torch.testing.assert_close(got[-len(expected) :], expected, atol=1e-3, rtol=1e-3)
            with pytest.raises(ConfigError, match="given hidden states by step"):
                model.generate(ids, max_new_tokens=2)


def test_step_does_not_go_on_in_rows_of_beams(model: Any, local: Any) -> None:
    with model.inference_session(max_length=64) as session:
        model.generate(tokens(1, 4), max_new_tokens=4, num_beams=3)
        with pytest.raises(ConfigError, match="as after a beam search"):
            session.step(local.model.embed_tokens(tokens(1, 1)).detach())


def test_an_assistant_that_is_the_model_itself_leaves_the_session_alone(
    talk: Talk, model: Any, local: Any
) -> None:
    talk.turn("greedy", tokens(1, 6))
    new = tokens(2, 3)
    got = model.generate(new, assistant_model=model, **COMMON, **GREEDY)
    assert talk.text is not None
    whole = torch.cat([talk.text, new], dim=1)
    wanted = local.generate(whole, **COMMON, **GREEDY)
    assert torch.equal(got, wanted[:, talk.text.shape[1] :])


def test_one_turn_at_a_time(talk: Talk, model: Any) -> None:
    class Intruder(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            with pytest.raises(ConfigError, match="generating already"):
                model.generate(tokens(1, 3), session=talk.session, max_new_tokens=1)

        def end(self) -> None:
            pass

    model.generate(tokens(1, 3), max_new_tokens=2, do_sample=False, streamer=Intruder())


@pytest.mark.parametrize("local_blocks", [None, "0:1,-1:"])
@pytest.mark.parametrize("when", [1, 3, 5])
def test_an_interrupt_between_the_servers_and_the_model(
    swarm: LocalSwarm,
    llama_folder: Path,
    local: Any,
    monkeypatch: pytest.MonkeyPatch,
    local_blocks: str | None,
    when: int,
) -> None:
    """Ctrl-C when a step has gone through and its answer has not been seen."""
    with AutoDistributedModelForCausalLM.from_pretrained(
        str(llama_folder),
        initial_peers=swarm.initial_peers,
        torch_dtype=torch.float32,
        local_blocks=local_blocks,
    ) as model:
        with model.inference_session(max_length=200) as session:
            talk = Talk(model, local, session)
            talk.turn("beams", tokens(1, 6))
            plain_call, left = session._loop_thread.call, when

            def interrupted_call(work: Any) -> Any:
                nonlocal left
                left -= 1
                answer = plain_call(work)
                if not left:
                    raise KeyboardInterrupt
                return answer

            monkeypatch.setattr(session._loop_thread, "call", interrupted_call)
            with pytest.raises(KeyboardInterrupt):
                run(model, "beams", local, tokens(2, 3))
            monkeypatch.undo()
            talk.turn("beams", tokens(3, 3))
            talk.turn("greedy", tokens(4, 2))
            fork = copy.deepcopy(session.cache)
        with torch.no_grad():
            assert talk.text is not None
            got = model(talk.text[:, -1:], past_key_values=fork).logits
            wanted = local(talk.text).logits[:, -1:]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_session_without_a_length_grows(model: Any, local: Any) -> None:
    with model.inference_session() as session:
        talk = Talk(model, local, session)
        talk.turn("greedy", tokens(1, 5))
        talk.turn("greedy", tokens(2, 60))
        talk.turn("beams", tokens(3, 30))


def test_a_closed_session_is_refused(model: Any, local: Any) -> None:
    with model.inference_session(max_length=20) as session:
        pass
    with pytest.raises(SessionClosed):
        model.generate(tokens(1, 3), session=session)


def test_a_session_of_another_model_is_refused(
    swarm: LocalSwarm, llama_folder: Path, model: Any
) -> None:
    with (
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as other,
        other.inference_session(max_length=20) as session,
    ):
        with pytest.raises(ConfigError, match="belongs to another model"):
            model.generate(tokens(1, 3), session=session)
        with (
            pytest.raises(ConfigError, match="belongs to another model"),
            model.use_session(session),
        ):
            pass
