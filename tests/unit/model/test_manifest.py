"""The manifest of weights: what it depends on and what not, and when files are read for it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint import COMMIT, edit_json, fake_hub_cache, stored_tensors

from planetserve.errors import ModelError
from planetserve.model import checkpoint as checkpoint_module
from planetserve.model import manifest as manifest_module
from planetserve.model import shards
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.manifest import Manifest, OwnWeights, group_of
from planetserve.testing.checkpoints import NUM_BLOCKS, make_tiny_checkpoint


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for digests that is empty at first."""
    folder = tmp_path / "digests"
    monkeypatch.setattr(checkpoint_module, "digests_folder", lambda: folder)
    return folder


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of weights read for hashing alone, piece by piece."""
    seen: list[int] = []

    def counting(path: Path, entry: shards.TensorEntry) -> object:
        for piece in shards.read_pieces(path, entry):
            seen.append(len(piece))
            yield piece

    monkeypatch.setattr(manifest_module, "read_pieces", counting)
    return seen


def manifest_of(model: str | Path, **options: object) -> Manifest:
    manifest = Checkpoint.open(str(model), **options).manifest(threading.Event())  # type: ignore[arg-type]
    assert manifest is not None
    return manifest


def test_tensors_are_grouped_by_block() -> None:
    assert group_of("model.layers.7.mlp.experts.3.w1.weight") == "model.layers.7"
    assert group_of("transformer.h.11.ln_1.bias") == "transformer.h.11"
    assert group_of("model.embed_tokens.weight") == ""
    assert group_of("layer1.weight") == ""


def test_every_block_has_a_digest(llama: Path) -> None:
    blocks = {f"model.layers.{index}" for index in range(NUM_BLOCKS)}
    assert set(manifest_of(llama).groups) == blocks | {""}


def test_the_same_weights_however_obtained(llama: Path, tmp_path: Path) -> None:
    expected = manifest_of(llama).hash
    assert len(expected) == 64
    copied = shutil.copytree(llama, tmp_path / "copy")
    (copied / "README.md").write_text("another text")
    edit_json(copied / "config.json", transformers_version="9", dtype="float16")
    assert manifest_of(copied).hash == expected
    whole = make_tiny_checkpoint(tmp_path / "whole")
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert manifest_of(whole).hash == expected
    fake_hub_cache(llama, tmp_path / "hub")
    assert manifest_of("org/tiny", cache_dir=str(tmp_path / "hub")).hash == expected
    by_path = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert manifest_of(by_path).hash == expected


def changed(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    name = "model.layers.3.mlp.up_proj.weight"
    weight = tensors[name]
    if kind == "byte":
        weight.view(torch.uint8).view(-1)[1000] ^= 1
    elif kind == "dtype":
        tensors[name] = weight.view(torch.int32)
    elif kind == "shape":
        tensors[name] = weight.view(-1)
    elif kind == "name":
        tensors["model.layers.3.mlp.other.weight"] = tensors.pop(name)
    elif kind == "swapped":
        other = "model.layers.2.mlp.up_proj.weight"
        tensors[name], tensors[other] = tensors[other], weight
    return tensors


@pytest.mark.parametrize("kind", ["byte", "dtype", "shape", "name", "swapped"])
def test_other_weights_have_another(llama: Path, tmp_path: Path, kind: str) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    tensors = changed(stored_tensors(llama), kind)
    save_file({name: value.contiguous() for name, value in tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    original, other = manifest_of(llama), manifest_of(tmp_path)
    assert other.hash != original.hash
    differing = {name for name in original.groups if original.groups[name] != other.groups[name]}
    expected = {"model.layers.3"} | ({"model.layers.2"} if kind == "swapped" else set())
    assert differing == expected


def test_another_configuration_is_another_model(llama: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(llama, tmp_path / "copy")
    edit_json(copied / "config.json", rope_theta=1.0)
    assert manifest_of(copied).hash != manifest_of(llama).hash


def test_what_is_loaded_is_not_read_again(llama: Path, read_bytes: list[int]) -> None:
    expected = manifest_of(llama).hash
    total = sum(read_bytes)
    read_bytes.clear()
    shutil.rmtree(checkpoint_module.digests_folder())
    checkpoint = Checkpoint.open(str(llama))
    span = [name for name in checkpoint.tensor_names() if group_of(name) == "model.layers.2"]
    assert len(dict(checkpoint.read_tensors(span))) == len(span)
    manifest = checkpoint.manifest(threading.Event())
    assert manifest is not None
    assert manifest.hash == expected
    assert sum(read_bytes) == total - checkpoint.tensor_bytes(span)


def test_digests_are_kept_until_a_file_changes(
    llama: Path, tmp_path: Path, read_bytes: list[int]
) -> None:
    copied = shutil.copytree(llama, tmp_path / "copy")
    before = manifest_of(copied).hash
    read_bytes.clear()
    assert manifest_of(copied).hash == before
    assert read_bytes == []
    file = sorted(copied.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # file systems count time in ticks
    assert manifest_of(copied).hash != before
    with safe_open(file, "pt") as opened:
        tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
    assert sum(read_bytes) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tensors": {}}', "damaged"])
def test_damaged_notes_are_made_again(llama: Path, kept: Path, text: str) -> None:
    expected = manifest_of(llama).hash
    for path in kept.iterdir():
        note = json.loads(path.read_text())
        note["tensors"] = {name: "00" for name in note["tensors"]}
        path.write_text(json.dumps(note) if text == "damaged" else text)
    assert manifest_of(llama).hash == expected


def test_a_cache_that_cannot_be_written_costs_nothing_else(llama: Path, kept: Path) -> None:
    kept.write_text("a file where the folder would be")
    assert manifest_of(llama).hash == manifest_of(llama).hash


def test_missing_files_make_it_unknowable(llama: Path, tmp_path: Path) -> None:
    fake_hub_cache(llama, tmp_path)
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    sorted(snapshot.glob("*.safetensors"))[0].unlink()
    checkpoint = Checkpoint.open("org/tiny", cache_dir=str(tmp_path))
    assert checkpoint.manifest(threading.Event()) is None


def test_reading_stops_when_asked(llama: Path, read_bytes: list[int]) -> None:
    stop = threading.Event()
    stop.set()
    assert Checkpoint.open(str(llama)).manifest(stop) is None
    assert len(read_bytes) == 1


def test_progress_is_said_when_it_takes_long(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manifest_of(llama)
    assert not [r for r in caplog.records if "hashes its weights" in r.getMessage()]
    shutil.rmtree(checkpoint_module.digests_folder())
    monkeypatch.setattr(manifest_module, "_PROGRESS_PERIOD_S", 0.0)
    manifest_of(llama)
    assert [r for r in caplog.records if "hashes its weights" in r.getMessage()]


def test_a_file_that_ends_early_is_an_error(llama: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(llama, tmp_path / "copy")
    checkpoint = Checkpoint.open(str(copied))
    file = sorted(copied.glob("*.safetensors"))[1]
    assert checkpoint.fingerprint
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="ends inside"):
        checkpoint.manifest(threading.Event())


async def test_a_node_learns_what_it_has(llama: Path) -> None:
    expected = manifest_of(llama).hash
    weights = OwnWeights("name", Checkpoint.open(str(llama)).manifest)
    await weights.learn()
    await weights.wait_settled(0)
    assert weights.manifest == expected


async def test_recalling_reads_no_weights(llama: Path) -> None:
    weights = OwnWeights("name", Checkpoint.open(str(llama)).manifest)
    await weights.recall()
    assert weights.manifest == ""
    expected = manifest_of(llama).hash
    later = OwnWeights("name", Checkpoint.open(str(llama)).manifest)
    await later.recall()
    assert later.manifest == expected


async def test_a_node_that_leaves_stops_reading() -> None:
    began, stopped = threading.Event(), threading.Event()

    def read(stop: threading.Event) -> None:
        began.set()
        stop.wait(60)
        stopped.set()

    weights = OwnWeights("name", read)
    learning = asyncio.create_task(weights.learn())
    assert await asyncio.to_thread(began.wait, 60)
    learning.cancel()
    await asyncio.gather(learning, return_exceptions=True)
    assert await asyncio.to_thread(stopped.wait, 60)


async def test_damaged_files_leave_the_name(caplog: pytest.LogCaptureFixture) -> None:
    def read(_stop: threading.Event) -> None:
        raise ModelError("a file is damaged")

    weights = OwnWeights("name", read)
    await weights.learn()
    assert weights.manifest == ""
    assert "a file is damaged" in caplog.text
