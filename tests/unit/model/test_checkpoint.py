"""Checkpoints: identity, names, lazy reads, and one-line errors for what cannot be opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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


def sharded(folder: Path, seed: int = 0) -> Path:
    return make_tiny_checkpoint(folder, seed=seed, max_shard_size="40KB")


def local_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as transformers reads them."""
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def assert_reads_like_transformers(folder: Path) -> None:
    expected = local_tensors(folder)
    read = dict(Checkpoint.open(str(folder)).read_tensors(expected))
    for name, value in expected.items():
        assert torch.equal(read[name], value), name


@pytest.mark.parametrize("keep", ["both", "index only of the old one", "config points to it"])
def test_among_several_files_transformers_choice_is_read(tmp_path: Path, keep: str) -> None:
    """Shards of an older save, and what else may lie beside the file that counts."""
    folder = sharded(tmp_path / "old")
    new = make_tiny_checkpoint(tmp_path / "new", seed=1)
    shutil.copy(new / "model.safetensors", folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    (folder / "consolidated.safetensors").write_bytes(b"")
    if keep == "index only of the old one":
        for shard in folder.glob("model-*"):
            shard.unlink()
    elif keep == "config points to it":
        edit_json(folder / "config.json", transformers_weights="model.safetensors.index.json")
    assert_reads_like_transformers(folder)


@pytest.mark.parametrize(
    ("index", "refused"),
    [("{", False), ('{"weight_map": 3}', False), ('{"weight_map": {"a": "/etc/passwd"}}', True)],
)
def test_an_index_that_is_not_followed_is_said_and_refused_if_hostile(
    tmp_path: Path, index: str, refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    (folder / "model.safetensors.index.json").write_text(index)
    if refused:
        with pytest.raises(ModelError, match="below the model's folder"):
            Checkpoint.open(str(folder)).tensor_names()
    else:
        assert_reads_like_transformers(folder)
        assert "index.json beside it is not" in caplog.text


def test_a_file_named_by_the_configuration_is_read(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts" / "weights.safetensors")
    shutil.copy(make_tiny_checkpoint(tmp_path / "b", seed=1) / "model.safetensors", folder)
    edit_json(folder / "config.json", transformers_weights="parts/weights.safetensors")
    assert_reads_like_transformers(folder)
    edit_json(folder / "config.json", transformers_weights="../b/model.safetensors")
    with pytest.raises(ModelError, match="below the model's folder"):
        Checkpoint.open(str(folder)).tensor_names()


def test_shards_in_sub_folders_are_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    (folder / "parts" / "a").mkdir(parents=True)
    for shard in set(names.values()):
        (folder / shard).rename(folder / "parts" / "a" / shard)
    edit_json(index, weight_map={name: f"parts/a/{shard}" for name, shard in names.items()})
    assert_reads_like_transformers(folder)


def test_a_sub_folder_that_leads_out_is_not_followed(llama: Path, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "parts").symlink_to(llama)
    shard = next(llama.glob("*.safetensors")).name
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": f"parts/{shard}"}}))
    with pytest.raises(ModelError, match="not within the model's folder"):
        Checkpoint.open(str(folder)).tensor_names()


@pytest.mark.parametrize("change", ["wrong shard", "too few names", "in two shards"])
def test_an_index_is_a_list_of_files(tmp_path: Path, change: str) -> None:
    """As for transformers: every tensor of every listed file counts, of twins the last one."""
    folder = sharded(tmp_path)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(names.values()))
    if change == "wrong shard":
        names = {name: shards[0] for name in names} | {f"extra.{shard}": shard for shard in shards}
    elif change == "too few names":
        names = {shard: shard for shard in shards}
    else:
        first, last = (load_file(folder / shard) for shard in (shards[0], shards[-1]))
        twin = next(iter(first))
        save_file(last | {twin: first[twin] + 1}, folder / shards[-1], {"format": "pt"})
    edit_json(index, weight_map=names)
    assert_reads_like_transformers(folder)


@pytest.mark.parametrize(
    ("filename", "words"),
    [
        ("pytorch_model.bin", "can run code.*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "can run code"),
        ("weights.pth", "can run code"),
        ("tiny.Q4_K_M.gguf", "llama.cpp"),
        ("consolidated.safetensors", "maker's own layout"),
        ("model.fp16.safetensors", "variant"),
        ("weights.npz", "another framework"),
        ("model-00001-of-00002.safetensors", "whole folder again"),
        ("adapter_config.json", "adapters are not served"),
        ("shard-00000-model-00000-of-00001.safetensors", "distributed checkpoint"),
        ("README.md", "whole folder again"),
    ],
)
def test_weights_that_are_not_read_are_refused_with_the_way_out(
    llama: Path, tmp_path: Path, filename: str, words: str
) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    (tmp_path / filename).write_bytes(b"x")
    with pytest.raises(ModelError, match=words):
        Checkpoint.open(str(tmp_path)).tensor_names()


@pytest.mark.parametrize(
    ("filename", "words"),
    [
        ("adapter_config.json", "adapters are not served"),
        ("model_index.json", "diffusers"),
        ("tiny.gguf", "llama.cpp"),
        ("consolidated.00.pth", "can run code"),
        ("checkpoint-500/config.json", "folder checkpoint-500 has one"),
    ],
)
def test_a_folder_without_a_configuration_is_told_by_what_it_holds(
    tmp_path: Path, filename: str, words: str
) -> None:
    (tmp_path / filename).parent.mkdir(exist_ok=True)
    (tmp_path / filename).write_text("{}")
    with pytest.raises(ModelError, match=words):
        Checkpoint.open(str(tmp_path))


@pytest.mark.parametrize("filename", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_has_the_name_but_is_no_file_is_told(
    llama: Path, tmp_path: Path, filename: str, kind: str
) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    path = tmp_path / filename
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "absent")
    with pytest.raises(ModelError, match="a folder, a pipe or a link to nowhere"):
        Checkpoint.open(str(tmp_path)).tensor_names()


def test_a_git_lfs_pointer_is_told_from_a_file(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    for filename in ("model.safetensors", "config.json"):
        (tmp_path / filename).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:")
        with pytest.raises(ModelError, match="git lfs pull"):
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
