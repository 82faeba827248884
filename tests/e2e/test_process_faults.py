"""A server process is killed, stopped or asked to leave in the middle of a text: no token changes.

Two replicas of each half of a model, as separate processes. The fault hits the hop in use, and its
libp2p daemon with it. Models with recurrent layers keep states besides keys and values; a
replacement has to compute both again.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from transformers.generation.streamers import BaseStreamer

from planetserve import AutoDistributedModelForCausalLM
from planetserve.testing.checkpoints import NUM_BLOCKS, load_local, make_tiny_checkpoint

LOOPBACK = ("--host_maddrs", "/ip4/127.0.0.1/tcp/0")
NUM_NEW = 24


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    return make_tiny_checkpoint(tmp_path / "model", family, seed=3)


@pytest.fixture
def replicas(tmp_path: Path, folder: Path, started: list[Command]) -> list[Command]:
    """A bootstrap peer, and two servers of each half of the model."""
    bootstrap = Command(tmp_path, "run_dht", *LOOPBACK)
    started.append(bootstrap)
    peers = bootstrap.wait_ready()["addresses"]
    middle = NUM_BLOCKS // 2
    for span in (f"0:{middle}", f"{middle}:{NUM_BLOCKS}"):
        started += [
            Command(
                tmp_path,
                "run_server",
                str(folder),
                "--block_indices",
                span,
                "--initial_peers",
                *peers,
                *LOOPBACK,
                "--num_threads",
                "1",
            )
            for _ in range(2)
        ]
    for command in started:
        command.wait_ready()
    return started


class _FaultAt(BaseStreamer):
    """Sends a signal to the processes of one hop when some tokens have come."""

    def __init__(self, model: Any, commands: list[Command], hop: int, number: int, after: int):
        self.model, self.commands = model, commands
        self.hop, self.number, self.after = hop, number, after
        self.hit: str | None = None

    def put(self, value: torch.Tensor) -> None:
        self.after -= 1
        if self.after:
            return
        self.hit = self.model.chain.hops[self.hop].peer_id
        (self.command,) = [c for c in self.commands if c.wait_ready()["peer_id"] == self.hit]
        if self.number == signal.SIGTERM:
            self.command.process.send_signal(self.number)
        else:
            self.command.signal_all(self.number)

    def end(self) -> None:
        return


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("family", "number"),
    [
        ("llama", signal.SIGKILL),
        ("llama", signal.SIGSTOP),
        ("llama", signal.SIGTERM),
        ("qwen3_next", signal.SIGKILL),
        ("falcon_h1", signal.SIGKILL),
    ],
)
def test_tokens_survive_a_process_fault(
    replicas: list[Command], folder: Path, prompt: torch.Tensor, number: int
) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    peers = replicas[0].wait_ready()["addresses"]
    expected = load_local(folder).generate(prompt, **options)
    with AutoDistributedModelForCausalLM.from_pretrained(
        str(folder), initial_peers=peers, probe_after=1.0, ping_timeout=1.0
    ) as model:
        # Both hops in turn: the second fault leaves one server of each half.
        for hop in (1, 0):
            fault = _FaultAt(model, replicas[1:], hop, number, after=6)
            assert torch.equal(model.generate(prompt, **options, streamer=fault), expected)
            assert fault.hit is not None
            assert fault.hit not in [item.peer_id for item in model.chain.hops]
            if number == signal.SIGTERM:
                # It goes by itself once the session has moved.
                assert fault.command.process.wait(timeout=20) == 0
