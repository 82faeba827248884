"""What people give as a model: each spelling is found or refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from planetserve.client.hf.from_pretrained import (
    AutoDistributedConfig,
    AutoDistributedModelForCausalLM,
)
from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.file_sources import open_source


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a home folder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "dangling").symlink_to("nothing")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Path("models/absent"), "does not exist"),
        (Path("absent"), "does not exist"),
        (Path("/nowhere/absent"), "does not exist"),
        (Path("~/absent"), "does not exist"),
        ("~/absent", "does not exist"),
        ("../absent", "does not exist"),
        ("models/absent", "there is none at models/absent"),
        ("models/absent/deep", "neither an existing folder nor a hub model id"),
        ("tiny.gguf", "format of llama.cpp"),
        (Path("file.safetensors"), "is a file"),
        ("./file.safetensors", "is a file"),
        ("file.safetensors", "is a file"),
        (Path("empty"), "no config.json"),
        ("empty", "no config.json"),
        ("empty/", "no config.json"),
        ("./dangling", "does not exist"),
        ("", "not ''"),
        ("  ", "not '  '"),
        (None, "not None"),
        (7, "not 7"),
        (b"models/absent", "not b'models/absent'"),
        ("x" * 5000, "neither a folder nor a model on the hub"),
        ("~no-such-user/x", "neither a folder nor a model on the hub"),
        ("nul\0byte", "nul"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(here: Path, model: Any, words: str) -> None:
    peers = ["/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"]
    for load in (
        lambda: AutoDistributedModelForCausalLM.from_pretrained(model, initial_peers=peers),
        lambda: AutoDistributedConfig.from_pretrained(model),
        lambda: Checkpoint.open(model),
    ):
        with pytest.raises(ModelError) as error:
            load()
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_folder_may_be_a_path(here: Path, llama: Path) -> None:
    shutil.copytree(llama, here / "org" / "model")
    for model in (Path("org/model"), "org/model", here / "org" / "model"):
        assert AutoDistributedConfig.from_pretrained(model).num_hidden_layers == 4


def test_demo_is_the_packaged_model_also_beside_a_folder_of_that_name(
    here: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packaged = Checkpoint.open("demo")
    assert not caplog.records
    shutil.copytree(llama, here / "demo")
    assert Checkpoint.open("demo").fingerprint == packaged.fingerprint
    assert "write ./demo" in caplog.text
    for model in ("./demo", Path("demo"), str(here / "demo")):
        assert Checkpoint.open(model).fingerprint == Checkpoint.open(str(llama)).fingerprint


def test_only_local_files_are_asked_for_where_that_is_wanted(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def download(*names: str, **options: Any) -> str:
        seen.append(options)
        raise FileNotFoundError("nothing here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ModelError):
        open_source("org/model", local_files_only=True, cache_dir=here)
    assert seen[0]["local_files_only"] is True
    assert seen[0]["cache_dir"] == str(here)


@pytest.mark.parametrize(
    ("filename", "words"),
    [
        ("tiny.Q4_K_M.gguf", "format of llama.cpp"),
        ("adapter_config.json", "merge it into its"),
    ],
)
def test_a_repository_without_a_configuration_is_told_by_what_it_holds(
    here: Path, filename: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*names: str, **options: Any) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *args, **options: ["README.md", filename])
    with pytest.raises(ModelError, match=rf"has no config\.json on the hub; .*{words}"):
        open_source("org/model")
