"""The client's half: the family's own class, its `generate()`, and what `on_call` sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from planetserve.check.chain import LengthCache, LocalChain
from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.client_half import NO_ATTENTION, load_client_half
from planetserve.model.decoder import find_decoder
from planetserve.model.loading import build_on_meta
from planetserve.testing.checkpoints import make_tiny_checkpoint, tiny_config
from planetserve.types import BlockSpan


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "bloom", "mpt", "nanochat", "gemma2", "cohere"]
)
def test_generate_is_the_local_models(family: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, family)
    spans = [BlockSpan(0, 2), BlockSpan(2, 4)]
    chain = LocalChain(Checkpoint.open(str(folder)), [(span, span) for span in spans])
    local = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 17, 80, 33]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = local.generate(ids, **options)
    with torch.inference_mode():
        got = chain.model.generate(ids, past_key_values=chain.length, **options)
    assert type(chain.model) is type(local)
    assert got.tolist() == expected.tolist()


def test_no_layers_are_loaded(llama: Path) -> None:
    model = load_client_half(
        Checkpoint.open(str(llama)), torch.bfloat16, "cpu", remote=lambda hidden: hidden
    )
    names = {name for name, _ in model.named_parameters()}
    assert names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.config.num_hidden_layers == 4
    assert model.config._attn_implementation == NO_ATTENTION


def test_on_call_sees_arguments_by_name_and_may_change_them(llama: Path) -> None:
    seen: list[dict[str, Any]] = []

    def on_call(kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(kwargs))
        return kwargs | {"use_cache": False}

    model = load_client_half(
        Checkpoint.open(str(llama)), torch.float32, "cpu", lambda hidden: hidden, on_call
    )
    ids, mask = torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.int64)
    cache = LengthCache()
    with torch.inference_mode():
        output = model.model(ids, mask, past_key_values=cache, use_cache=True)
        embedded = model.model.norm(model.model.embed_tokens(ids))
    assert seen[0]["input_ids"] is ids
    assert seen[0]["attention_mask"] is mask
    assert seen[0]["past_key_values"] is cache
    assert seen[0]["use_cache"] is True
    assert torch.equal(output.last_hidden_state, embedded)


def test_an_error_in_the_remote_call_passes_through_and_leaves_the_model_usable(
    tmp_path: Path,
) -> None:
    fail = True

    def remote(hidden: torch.Tensor) -> torch.Tensor:
        if fail:
            raise ModelError("a hop is gone")
        return hidden

    folder = make_tiny_checkpoint(tmp_path, "nanochat")
    model = load_client_half(Checkpoint.open(str(folder)), torch.float32, "cpu", remote)
    ids = torch.tensor([[3, 4]])
    with torch.inference_mode():
        with pytest.raises(ModelError, match="a hop is gone"):
            model(ids)
        fail = False
        assert model(ids).logits.shape == (1, 2, 96)


def test_the_checkpoints_generation_config_is_used(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[2, 9]).save_pretrained(folder)
    model = load_client_half(
        Checkpoint.open(str(folder)), torch.float32, "cpu", remote=lambda hidden: hidden
    )
    assert model.generation_config.temperature == 0.25
    assert model.generation_config.eos_token_id == [2, 9]


def test_a_model_without_a_final_norm_is_refused(tmp_path: Path) -> None:
    tiny_config("opt", do_layer_norm_before=False).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no norm after its last layer"):
        load_client_half(
            Checkpoint.open(str(tmp_path)), torch.float32, "cpu", lambda hidden: hidden
        )


@pytest.mark.parametrize(
    ("family", "layers", "norm"),
    [
        ("llama", "model.layers", "norm"),
        ("gpt2", "transformer.h", "ln_f"),
        ("bloom", "transformer.h", "ln_f"),
        ("opt", "model.decoder.layers", "final_layer_norm"),
        ("mpt", "transformer.blocks", "norm_f"),
    ],
)
def test_the_decoder_is_found(family: str, layers: str, norm: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    decoder = find_decoder(build_on_meta(Checkpoint.open(str(tmp_path)), torch.float32))
    assert (decoder.layers_path, decoder.final_norm_attr) == (layers, norm)
    assert decoder.layer_of(f"{layers}.3.x.weight") == 3
    assert decoder.layer_of("lm_head.weight") is None
