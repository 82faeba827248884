"""Checkpoints: identity, names, lazy reads, and one-line errors for what cannot be opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from planetserve.errors import ConfigError, ModelError
from planetserve.model.checkpoint import Checkpoint, parse_dtype
from planetserve.testing.checkpoints import NUM_BLOCKS, make_tiny_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sharded_tensors_are_found_and_read(llama: Path) -> None:
    checkpoint = Checkpoint.open(str(llama))
    expected = stored_tensors(llama)
    assert len(set(checkpoint.tensor_names().values())) > 2
    assert dict(checkpoint.read_tensors(expected)).keys() == expected.keys()
    for name, value in checkpoint.read_tensors(list(expected)):
        assert torch.equal(value, expected[name])
    assert checkpoint.tensor_bytes(expected) == sum(v.nbytes for v in expected.values())
    assert (checkpoint.num_blocks, checkpoint.hidden_size) == (NUM_BLOCKS, 32)


def test_a_tensor_nobody_stored_is_an_error(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor model\.ghost"):
        Checkpoint.open(str(llama)).read_tensor("model.ghost")


def test_fingerprint_depends_on_weights_alone(llama: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(str(llama))
    whole = Checkpoint.open(str(make_tiny_checkpoint(tmp_path / "whole")))
    other = Checkpoint.open(str(make_tiny_checkpoint(tmp_path / "other", seed=1)))
    assert len(set(whole.tensor_names().values())) == 1
    assert whole.fingerprint == original.fingerprint
    assert other.fingerprint != original.fingerprint
    assert other.model_prefix == original.model_prefix


def test_fingerprint_notices_one_changed_tensor(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "copy")
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed, original = Checkpoint.open(str(folder)), Checkpoint.open(str(llama))
    assert changed.fingerprint != original.fingerprint


def test_prefix_ignores_what_tools_rewrite_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "copy")
    before = Checkpoint.open(str(folder))
    edit_json(folder / "config.json", transformers_version="9", dtype="bfloat16", use_cache=False)
    same = Checkpoint.open(str(folder))
    edit_json(folder / "config.json", rms_norm_eps=0.5)
    different = Checkpoint.open(str(folder))
    assert before.model_prefix == same.model_prefix
    assert before.fingerprint == same.fingerprint
    assert before.model_prefix != different.model_prefix
    assert before.model_prefix.startswith("llama-")


def test_demo_is_packaged() -> None:
    checkpoint = Checkpoint.open("demo")
    assert checkpoint.name == "demo"
    assert checkpoint.num_blocks > 1
    assert checkpoint.generation_config() is not None


def test_what_cannot_be_opened_says_why(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    for model, words in (
        (str(tmp_path / "missing"), "does not exist"),
        ("./missing", "does not exist"),
        (str(file), "is a file"),
        (str(empty), "no config.json"),
        ("no such id!", "neither an existing folder nor a hub model id"),
    ):
        with pytest.raises(ModelError, match=words) as error:
            Checkpoint.open(model)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "model_type"),
        ('{"model_type": "no_such_family"}', "no_such_family"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot read the configuration"),
    ],
)
def test_a_broken_config_says_why(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=words) as error:
        Checkpoint.open(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "plain file name"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "not to safetensors"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"),
    ],
)
def test_a_broken_index_says_why(llama: Path, tmp_path: Path, content: str, words: str) -> None:
    folder = shutil.copytree(llama, tmp_path / "copy")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=words):
        Checkpoint.open(str(folder)).read_tensor("a")


def test_an_index_that_points_to_the_wrong_shard_is_an_error(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "copy")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    wrong = dict.fromkeys(names, names["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(ModelError, match="but it is not there"):
        Checkpoint.open(str(folder)).read_tensor("model.embed_tokens.weight")


def test_bin_checkpoints_are_refused_with_the_way_out(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="save_pretrained"):
        Checkpoint.open(str(tmp_path)).tensor_names()


def fake_hub_cache(model: Path, cache: Path) -> None:
    """A hub cache that holds one downloaded model."""
    repo = cache / "models--org--tiny"
    shutil.copytree(model, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)


def test_a_cached_hub_model_opens_without_network(llama: Path, tmp_path: Path) -> None:
    fake_hub_cache(llama, tmp_path)
    checkpoint = Checkpoint.open("org/tiny", cache_dir=str(tmp_path))
    local = Checkpoint.open(str(llama))
    assert checkpoint.fingerprint == f"hub-{COMMIT}"
    assert checkpoint.model_prefix == local.model_prefix
    assert checkpoint.pretrained_location == ("org/tiny", COMMIT)
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(checkpoint.read_tensor(name), local.read_tensor(name))
    by_path = Checkpoint.open(str(tmp_path / "models--org--tiny" / "snapshots" / COMMIT))
    assert by_path.fingerprint == checkpoint.fingerprint


def test_a_cached_hub_model_in_one_file_opens_without_network(tmp_path: Path) -> None:
    fake_hub_cache(make_tiny_checkpoint(tmp_path / "model"), tmp_path)
    checkpoint = Checkpoint.open("org/tiny", cache_dir=str(tmp_path))
    assert checkpoint.tensor_bytes(["model.norm.weight"]) == 32 * 4
    (checkpoint.path / "generation_config.json").unlink()
    assert checkpoint.generation_config() is None


def test_a_cached_config_alone_is_not_mistaken_for_a_bin_checkpoint(
    llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    fake_hub_cache(folder, tmp_path)
    with pytest.raises(ModelError, match="hub cannot be reached"):
        Checkpoint.open("org/tiny", cache_dir=str(tmp_path)).tensor_names()


def test_a_hub_model_that_is_not_cached_needs_the_network(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hub cannot be reached") as error:
        Checkpoint.open("org/absent", cache_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_dtypes_are_parsed_and_checked(llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(llama))
    assert parse_dtype("auto", checkpoint, "cpu") is torch.float32
    assert parse_dtype("bfloat16", checkpoint, "cpu") is torch.bfloat16
    half = shutil.copytree(llama, tmp_path / "half")
    edit_json(half / "config.json", dtype="float16")
    assert parse_dtype("auto", Checkpoint.open(str(half)), "cpu") is torch.float16
    edit_json(half / "config.json", dtype="int8")
    with pytest.raises(ConfigError, match="stored as"):
        parse_dtype("auto", Checkpoint.open(str(half)), "cpu")
    with pytest.raises(ConfigError, match="choose one of"):
        parse_dtype("int4", checkpoint, "cpu")
    with pytest.raises(ConfigError, match="cannot compute"):
        parse_dtype("float32", checkpoint, "meta")
