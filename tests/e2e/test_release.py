"""Closing leaves nothing behind: no thread, no process, no socket file."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import psutil
import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.errors import PeerUnreachable
from planetserve.testing.swarm import LocalSwarm


def _daemons() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _sockets() -> set[str]:
    return {path.name for path in Path("/tmp").glob("hivemind-*")}


def _threads() -> set[threading.Thread]:
    # tqdm keeps one thread for all progress bars of a process, whoever showed the first.
    return {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"}


def test_close_leaves_nothing(llama_folder: Path, prompt: torch.Tensor) -> None:
    before = (_daemons(), _sockets(), _threads())
    num_files = psutil.Process().num_fds()
    with LocalSwarm(str(llama_folder), ["0:3", "3:6"]) as swarm:
        with AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as model:
            model.generate(prompt, max_new_tokens=2)
            assert _daemons() != before[0]
        assert len(_daemons() - before[0]) == 3
    gc.collect()
    assert (_daemons(), _sockets(), _threads()) == before
    assert psutil.Process().num_fds() <= num_files


def test_forgotten_model_is_released(swarm: LocalSwarm, llama_folder: Path) -> None:
    before = (_daemons(), _threads())
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(llama_folder), initial_peers=swarm.initial_peers
    )
    assert (_daemons(), _threads()) != before
    del model
    gc.collect()
    assert (_daemons(), _threads()) == before


def test_abandoned_start_is_released(llama_folder: Path) -> None:
    before = (_daemons(), _sockets(), _threads())
    peer = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    with pytest.raises(PeerUnreachable):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama_folder), initial_peers=[peer])
    gc.collect()
    assert (_daemons(), _sockets(), _threads()) == before
