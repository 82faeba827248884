"""A multimodal checkpoint is served by its language model; its towers might as well not exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from planetserve.check.chain import LocalChain, local_logits
from planetserve.errors import ConfigError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.client_half import load_client_half
from planetserve.model.span_blocks import SpanBlocks
from planetserve.model.text_config import shares_kv_heads, text_config
from planetserve.testing.checkpoints import load_local, make_tiny_checkpoint, tiny_config
from planetserve.types import BlockSpan

IDS = torch.tensor([[5, 9, 17, 3, 44, 8, 60]])

TOWERS = re.compile("vision|visual|projector|audio|image|embed_audio")


def chain_of(folder: Path) -> LocalChain:
    spans = [BlockSpan(0, 1), BlockSpan(1, 3), BlockSpan(3, 4)]
    return LocalChain(Checkpoint.open(str(folder)), [(span, span) for span in spans])


@pytest.mark.parametrize(
    "family", ["gemma3", "llava", "qwen2_5_vl", "llama4", "internvl", "kimi_k25"]
)
def test_towers_are_not_needed_at_either_end(family: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, family)
    expected = local_logits(load_local(tmp_path), [IDS])[0]
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    kept = {name: value for name, value in tensors.items() if not TOWERS.search(name)}
    assert len(kept) < len(tensors)
    save_file(kept, path)
    torch.testing.assert_close(chain_of(tmp_path).logits(IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_files_of_towers_are_not_fetched(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_checkpoint(tmp_path, family, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    fetched: set[str] = set()
    fetch = Checkpoint.fetch_shards

    def note(self: Checkpoint, names: list[str]) -> None:
        names = list(names)
        fetched.update(names)
        fetch(self, names)

    monkeypatch.setattr(Checkpoint, "fetch_shards", note)
    chain_of(tmp_path)
    assert fetched
    assert fetched == {name for name in index if not TOWERS.search(name)}


@pytest.mark.parametrize(
    ("family", "renamings"),
    [
        (
            "gemma3",
            {r"^model\.language_model\.": "language_model.model.", r"^model\.(?=[vm])": ""},
        ),
        (
            "llava",
            {
                r"^model\.language_model\.": "language_model.model.",
                r"^lm_head": "language_model.lm_head",
                r"^model\.(?=[vm])": "",
            },
        ),
        ("qwen2_5_vl", {r"^model\.language_model\.": "model.", r"^model\.visual": "visual"}),
        ("qwen2_vl", {r"^model\.language_model\.": "model.", r"^model\.visual": "visual"}),
        (
            "mistral3",
            {r"^model\.language_model\.": "language_model.model.", r"^model\.(?=[vm])": ""},
        ),
    ],
)
def test_keys_of_older_checkpoints_are_found(
    family: str, renamings: dict[str, str], tmp_path: Path
) -> None:
    make_tiny_checkpoint(tmp_path, family)
    path = tmp_path / "model.safetensors"
    old = {}
    for name, value in load_file(path).items():
        for pattern, replacement in renamings.items():
            name = re.sub(pattern, replacement, name)
        old[name] = value
    save_file(old, path, {"format": "pt"})
    expected = local_logits(load_local(tmp_path), [IDS])[0]
    torch.testing.assert_close(chain_of(tmp_path).logits(IDS), expected, atol=1e-4, rtol=0)


def test_images_are_refused_in_one_line(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, "llava")
    client = load_client_half(
        Checkpoint.open(str(tmp_path)), torch.float32, "cpu", remote=lambda hidden: hidden
    )
    with pytest.raises(ConfigError, match="give it text only") as error:
        client(input_ids=IDS, pixel_values=torch.zeros(1, 3, 28, 28))
    assert "\n" not in str(error.value)


def test_the_language_model_is_found_at_any_depth() -> None:
    config = tiny_config("gemma3")
    assert text_config(config) is config.text_config
    nested = AutoConfig.for_model("qwen2_5_omni")
    assert text_config(nested) is nested.thinker_config.text_config
    assert text_config(tiny_config("llama")).model_type == "llama"


def test_heads_of_each_layer_count() -> None:
    assert shares_kv_heads(tiny_config("gemma4"))
    assert shares_kv_heads(tiny_config("llama"))
    assert not shares_kv_heads(tiny_config("llama_mha"))


def test_spans_of_layers_of_several_widths_cache_what_each_has(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, "gemma4")
    blocks = SpanBlocks.load(Checkpoint.open(str(tmp_path)), BlockSpan(1, 4), torch.float32)
    assert [shape.key_dim for shape in blocks.kv_shapes()] == [16, 8, 16]
    assert [shape.num_heads for shape in blocks.kv_shapes()] == [1, 2, 1]
