"""Caches in the hands of users: kept, copied, given, cut and widened, as with a local model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from planetserve.errors import ConfigError
from planetserve.testing.swarm import LocalSwarm

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_prefix_is_copied_for_several_prompts(
    model: Any, local: Any, prompt: torch.Tensor
) -> None:
    prefix, ends = prompt[:, :7], (prompt[:, 7:], prompt[:, 9:], prompt[:, 8:])
    with torch.no_grad():
        filled = model(prefix, past_key_values=DynamicCache(config=model.config)).past_key_values
    for end in ends:
        text = torch.cat([prefix, end], dim=1)
        copied = copy.deepcopy(filled)
        got = model.generate(text, past_key_values=copied, **GREEDY)
        assert torch.equal(got, local.generate(text, **GREEDY))
        assert copied.get_seq_length() == got.shape[1] - 1
    assert filled.get_seq_length() == 7
    whole = copy.deepcopy(model.generate(prompt, **GREEDY, return_dict_in_generate=True))
    text = torch.cat([whole.sequences, prefix], dim=1)
    got = model.generate(text, past_key_values=whole.past_key_values, **GREEDY)
    assert torch.equal(got, local.generate(text, **GREEDY))


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_a_conversation_over_an_empty_cache_of_hugging_face(
    model: Any, local: Any, prompt: torch.Tensor, make: Any
) -> None:
    options = {"max_cache_len": 64} if make is StaticCache else {}
    cache = make(config=model.config, **options)
    text = prompt[:, :5]
    for length in (2, 3):
        text = model.generate(text, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == text.shape[1] - 1
        assert torch.equal(text, local.generate(text[:, :-6], **GREEDY))
        text = torch.cat([text, prompt[:, :length]], dim=1)


def test_caches_that_give_other_numbers_are_refused(
    model: Any, local: Any, prompt: torch.Tensor
) -> None:
    filled = local(prompt).past_key_values
    quantized = QuantizedCache.__new__(QuantizedCache)
    for given in (filled, quantized):
        with pytest.raises(ConfigError, match="past_key_values of type"):
            model.generate(prompt, past_key_values=given, **GREEDY)
    with pytest.raises(ConfigError, match="cache_implementation='quantized'"):
        model.generate(prompt, cache_implementation="quantized", **GREEDY)
    with pytest.raises(ConfigError, match="either past_key_values or cache_implementation"):
        model.generate(
            prompt, past_key_values=DynamicCache(), cache_implementation="static", **GREEDY
        )


def test_a_cache_can_be_widened_and_narrowed(model: Any, local: Any, prompt: torch.Tensor) -> None:
    ends = torch.cat([prompt[:, 7:], prompt[:, 6:11], prompt[:, 5:10]])
    with torch.no_grad():
        cache = model(prompt[:, :7]).past_key_values
        cache.batch_repeat_interleave(3)
        whole = torch.cat([prompt[:, :7].expand(3, -1), ends], dim=1)
        close(model(ends, past_key_values=cache).logits, local(whole).logits[:, 7:])
        cache.batch_select_indices(torch.tensor([2, 1]))
        close(
            model(prompt[:, :2].expand(2, -1), past_key_values=cache).logits,
            local(torch.cat([whole[[2, 1]], prompt[:, :2].expand(2, -1)], dim=1)).logits[:, -2:],
        )


def test_a_cache_is_not_pickled(model: Any, prompt: torch.Tensor) -> None:
    with torch.no_grad():
        cache = model(prompt).past_key_values
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(cache)


def test_kept_outputs_do_not_use_up_the_servers_sessions(
    model: Any, local: Any, swarm: LocalSwarm, prompt: torch.Tensor
) -> None:
    with torch.no_grad():
        kept = [model(prompt[:, :4]) for _ in range(40)]
        open_here = sum(server.handler.num_sessions for server in swarm.servers)
        assert open_here <= 3 * 33
        for output in (kept[0], kept[-1]):
            rest = model(prompt[:, 4:], past_key_values=output.past_key_values).logits
            close(rest, local(prompt).logits[:, 4:])


def test_right_padding_is_refused(model: Any, prompt: torch.Tensor) -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    ids = prompt.repeat(2, 1)
    with pytest.raises(ConfigError, match="pad on the left"):
        model.generate(ids, attention_mask=mask, **GREEDY)
    with torch.no_grad(), pytest.raises(ConfigError, match="pad on the left"):
        model(ids, attention_mask=mask, logits_to_keep=1)


def test_texts_packed_into_one_row_are_refused(
    model: Any, local: Any, prompt: torch.Tensor
) -> None:
    positions = torch.arange(12)[None] % 6
    with torch.no_grad():
        with pytest.raises(ConfigError, match="give each text a row of its own"):
            model(prompt, position_ids=positions, use_cache=False)
        with pytest.raises(ConfigError, match="input_ids must be a 2D tensor"):
            model(prompt[0])
        # With a cache or a mask Hugging Face takes them for one text.
        for options in ({}, {"attention_mask": torch.ones_like(prompt), "use_cache": False}):
            options = {"position_ids": positions, **options}
            close(model(prompt, **options).logits, local(prompt, **options).logits)


def test_positions_that_fit_no_input_go_to_no_server(model: Any, prompt: torch.Tensor) -> None:
    for positions in (torch.arange(2)[None], torch.arange(12).repeat(3, 1)):
        with torch.no_grad(), pytest.raises(ConfigError, match="do not fit an input of 1 rows"):
            model(prompt, position_ids=positions)
    with pytest.raises(ConfigError, match="do not fit an input of 1 rows"):
        model.generate(prompt, attention_mask=torch.ones(1, 2), **GREEDY)
    with torch.no_grad(), pytest.raises(ConfigError, match="must be between 0 and"):
        model(prompt, position_ids=torch.arange(12)[None] - 3)
    with torch.no_grad(), pytest.raises(ConfigError, match="32 floating-point numbers"):
        model(inputs_embeds=torch.zeros(1, 3, 5))
    for read in (
        lambda: model.model.layers[0],
        lambda: model.model.layers[0:3],
        lambda: model.model.layers(torch.zeros(1, 1, 32)),
        lambda: model.generate(prompt, session=model.inference_session(), **GREEDY),
    ):
        with pytest.raises(ConfigError, match=r"session\.step|an open session"):
            read()


def test_a_mask_counts_what_the_cache_was_filled_with(
    model: Any, local: Any, padded: dict[str, torch.Tensor]
) -> None:
    ids, mask = padded["input_ids"], padded["attention_mask"]
    new = torch.tensor([[5], [6], [7]])
    whole = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
    more = whole.clone()
    more[:, 0] = 1 - more[:, 0]
    with torch.no_grad():
        for refused in (None, whole[:, -1:], more):
            cache = model(ids, attention_mask=mask).past_key_values
            with pytest.raises(ConfigError, match="attention_mask must go over all columns"):
                model(new, attention_mask=refused, past_key_values=cache)
            theirs = local(ids, attention_mask=mask).past_key_values
            options = {"attention_mask": whole, "position_ids": mask.sum(1, keepdim=True)}
            got = model(new, past_key_values=cache, **options).logits
            close(got, local(new, past_key_values=theirs, **options).logits)
        with pytest.raises(ConfigError, match="a cache of its own"):
            local(new, past_key_values=cache)


def test_a_configuration_without_a_cache_keeps_none(model: Any, prompt: torch.Tensor) -> None:
    model.config.use_cache = False
    try:
        with torch.no_grad():
            assert model(prompt).past_key_values is None
            assert model(prompt, use_cache=True).past_key_values is not None
    finally:
        model.config.use_cache = True


def test_a_call_that_fails_leaves_nothing_behind(
    model: Any, local: Any, prompt: torch.Tensor
) -> None:
    missing = torch.tensor([[5, 99_999]])
    with torch.no_grad():
        for ask in (model, lambda ids: model(ids, logits_to_keep=1), model.model):
            with pytest.raises(IndexError):
                ask(missing)
            close(model.model(prompt).last_hidden_state, local.model(prompt).last_hidden_state)
        with pytest.raises(ConfigError, match="past_key_values of type tuple"):
            model(prompt, logits_to_keep=1, past_key_values=())
        close(model.model(prompt).last_hidden_state, local.model(prompt).last_hidden_state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_early_exit": 2}, "assistant_early_exit needs the model's layers"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' needs"),
    ],
)
def test_what_reaches_into_layers_is_refused(
    model: Any, prompt: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate(prompt, **GREEDY, **options)
    with pytest.raises(ConfigError, match="continuous batching"):
        model.generate_batch([prompt[0].tolist()])
