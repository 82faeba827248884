"""Which servers have a client's weights: those with the same bytes, whatever they call them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.errors import ModelMismatchError
from planetserve.model.checkpoint import Checkpoint
from planetserve.testing.swarm import LocalSwarm

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache that holds the model as `org/tiny`."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / "models--org--tiny"
    shutil.copytree(llama_folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return cache


def changed_between_samples(folder: Path, target: Path) -> Path:
    """A copy with one changed byte that the fingerprint does not notice."""
    copied = shutil.copytree(folder, target)
    original = Checkpoint.open(str(folder))
    name = "model.layers.1.mlp.up_proj.weight"
    file = copied / original.tensor_names()[name]
    start = original._entry(name, local=True).start
    data = bytearray(file.read_bytes())
    data[start + 100] ^= 1
    file.write_bytes(data)
    assert Checkpoint.open(str(copied)).fingerprint == original.fingerprint
    return copied


def test_a_folder_serves_clients_of_the_hub_model(
    llama_folder: Path, hub: Path, prompt: torch.Tensor, local: Any
) -> None:
    with LocalSwarm(str(llama_folder), ["0:6"]) as swarm:
        by_name = Checkpoint.open("org/tiny", cache_dir=str(hub))
        assert by_name.fingerprint != swarm.servers[0].checkpoint.fingerprint
        with AutoDistributedModelForCausalLM.from_pretrained(
            "org/tiny", cache_dir=str(hub), initial_peers=swarm.initial_peers
        ) as model:
            expected = local.generate(prompt, max_new_tokens=4, do_sample=False)
            assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)


def test_one_changed_byte_makes_it_another_model(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    altered = changed_between_samples(llama_folder, tmp_path / "altered")
    with LocalSwarm(str(altered), ["0:6"]) as swarm:
        with pytest.raises(ModelMismatchError, match="only in another revision"):
            AutoDistributedModelForCausalLM.from_pretrained(
                str(llama_folder), initial_peers=swarm.initial_peers, wait_for_blocks_timeout=1.0
            )
        lines = [r.getMessage() for r in caplog.records if "is not used" in r.getMessage()]
        assert len(lines) == 1
        assert swarm.servers[0].node.peer_id in lines[0]
