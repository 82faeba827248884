"""Wrong models, missing blocks and full servers: one clear error each, in bounded time."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.clock import SystemClock
from planetserve.errors import (
    ConfigError,
    MissingBlocksError,
    ModelError,
    ModelMismatchError,
    PeerUnreachable,
    SessionClosed,
    SessionLengthError,
)
from planetserve.swarm.directory import Directory
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm
from planetserve.types import BlockSpan


@pytest.fixture(scope="module")
def other_revision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("revision")
    make_tiny_checkpoint(folder, "llama", seed=2, num_hidden_layers=6)
    return folder


def _load(folder: Path, swarm: LocalSwarm, **options: Any) -> Any:
    options = {"wait_for_blocks_timeout": 1.0, **options}
    return AutoDistributedModelForCausalLM.from_pretrained(
        str(folder), initial_peers=swarm.initial_peers, **options
    )


def test_missing_blocks_are_named(llama_folder: Path, prompt: torch.Tensor) -> None:
    with (
        LocalSwarm(str(llama_folder), ["0:2", "4:5"]) as swarm,
        _load(llama_folder, swarm) as model,
    ):
        with pytest.raises(MissingBlocksError, match=r"2:4, 5:6") as caught:
            model.generate(prompt, max_new_tokens=1)
        assert caught.value.missing == ((2, 4), (5, 6))
        swarm.add_server("2:6")
        assert model.generate(prompt, max_new_tokens=1).shape == (1, 13)


def test_client_with_another_revision(swarm: LocalSwarm, other_revision: Path) -> None:
    with pytest.raises(ModelMismatchError, match="another revision"):
        _load(other_revision, swarm)


def test_server_with_another_revision(
    llama_folder: Path,
    other_revision: Path,
    prompt: torch.Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It cannot know which of them is right: it serves its own clients and says what differs."""
    with LocalSwarm(str(llama_folder), ["0:6"]) as swarm:
        theirs = swarm.servers[0].checkpoint.fingerprint
        caplog.clear()
        ours = swarm.add_server("0:6", model=str(other_revision))
        (warning,) = [r.getMessage() for r in caplog.records if "other files" in r.getMessage()]
        assert theirs[:12] in warning
        assert ours.checkpoint.fingerprint[:12] in warning
        assert "--dht_prefix" in warning
        for folder in (llama_folder, other_revision):
            with _load(folder, swarm) as model:
                assert model.generate(prompt, max_new_tokens=1).shape == (1, 13)


def test_records_of_liars_keep_nobody_out(llama_folder: Path, prompt: torch.Tensor) -> None:
    """Somebody announces servers of another revision, of other sizes and of impossible speed."""
    lies: list[dict[str, Any]] = [
        {"fingerprint": "0" * 64, "manifest": "0" * 64},
        {"num_blocks": 60_000, "span": BlockSpan(0, 60_000)},
        {"network_bytes_per_s": 1e-300},
        {"tokens_per_s_per_block": 1e-300, "decode_ms_per_block": 1e15},
    ]
    with LocalSwarm(str(llama_folder), ["0:3"]) as swarm, contextlib.ExitStack() as liars:

        async def announce(lie: dict[str, Any]) -> SwarmNode:
            node = await SwarmNode.start(
                NodeConfig(client_mode=True, initial_peers=swarm.initial_peers)
            )
            info = dataclasses.replace(
                swarm.servers[0].info(), peer_id=node.peer_id, addresses=(), **lie
            )
            await Directory(node, SystemClock()).announce(info, ttl_s=300)
            return node

        for lie in lies:
            liars.callback(lambda node: swarm.call(node.close()), swarm.call(announce(lie)))
        server = swarm.add_server("0:1", block_indices=None, num_blocks=3)
        assert server.span == BlockSpan(3, 6)
        with _load(llama_folder, swarm) as model:
            assert model.generate(prompt, max_new_tokens=1).shape == (1, 13)


def test_client_with_another_model(swarm: LocalSwarm, tmp_path: Path, prompt: torch.Tensor) -> None:
    make_tiny_checkpoint(tmp_path, "gpt2", seed=2)
    with _load(tmp_path, swarm) as model, pytest.raises(ModelMismatchError, match="serves llama-"):
        model.generate(prompt, max_new_tokens=1)


def test_sequence_longer_than_the_servers_take(llama_folder: Path, prompt: torch.Tensor) -> None:
    options = {"inference_max_length": 16}
    with (
        LocalSwarm(str(llama_folder), ["0:6"], options) as swarm,
        _load(llama_folder, swarm) as model,
    ):
        with pytest.raises(SessionLengthError, match="at most 16"):
            model.generate(prompt, max_new_tokens=10)
        assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 16)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("/nowhere/model", {"initial_peers": ["x"]}, ModelError, "/nowhere/model"),
        (None, {}, ConfigError, "initial_peers"),
        (None, {"initial_peer": ["x"]}, ConfigError, "did you mean 'initial_peers'"),
        (None, {"initial_peers": ["nonsense"]}, ConfigError, "nonsense"),
        (None, {"initial_peers": ["x"], "torch_dtype": "float13"}, ConfigError, "float13"),
        (None, {"initial_peers": ["x"], "chain_optimizer": "magic"}, ConfigError, "shortest_path"),
    ],
)
def test_bad_arguments(
    llama_folder: Path, model: str | None, options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        AutoDistributedModelForCausalLM.from_pretrained(model or str(llama_folder), **options)


def test_folder_without_safetensors(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copy(llama_folder / "config.json", tmp_path)
    with pytest.raises(ModelError, match="safetensors"):
        AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), initial_peers=["x"])


def test_unreachable_peer(llama_folder: Path) -> None:
    peer = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    with pytest.raises(PeerUnreachable):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama_folder), initial_peers=[peer])


def test_closed_model_says_so(swarm: LocalSwarm, llama_folder: Path, prompt: torch.Tensor) -> None:
    model = _load(llama_folder, swarm)
    model.close()
    model.close()
    with pytest.raises(SessionClosed, match="load it again"):
        model.generate(prompt, max_new_tokens=1)
