"""The commands as a person runs them: real processes, exit codes, one-line errors, signals."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import ENVIRONMENT, Command

from planetserve import AutoDistributedModelForCausalLM


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "planetserve.run_server", *arguments],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.timeout(120)
def test_swarm_of_processes(
    tmp_path: Path, llama_folder: Path, local: Any, prompt: torch.Tensor, started: list[Command]
) -> None:
    bootstrap = Command(tmp_path, "run_dht", "--host_maddrs", "/ip4/127.0.0.1/tcp/0")
    started.append(bootstrap)
    peers = bootstrap.wait_ready()["addresses"]
    common = ["--initial-peers", *peers, "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
    first = Command(tmp_path, "run_server", str(llama_folder), "--block-indices", "0:4", *common)
    started.append(first)
    assert (first.wait_ready()["start"], first.wait_ready()["end"]) == (0, 4)
    # The rest of the model is what the swarm needs most.
    second = Command(tmp_path, "run_server", str(llama_folder), "--num_blocks", "2", *common)
    started.append(second)
    assert (second.wait_ready()["start"], second.wait_ready()["end"]) == (4, 6)
    with AutoDistributedModelForCausalLM.from_pretrained(
        str(llama_folder), initial_peers=peers
    ) as model:
        got = model.generate(prompt, max_new_tokens=6, do_sample=False)
        assert [hop.peer_id for hop in model.chain.hops] == [
            first.wait_ready()["peer_id"],
            second.wait_ready()["peer_id"],
        ]
    assert torch.equal(got, local.generate(prompt, max_new_tokens=6, do_sample=False))
    assert "--initial_peers " + first.wait_ready()["addresses"][0] in first.log.read_text()
    daemons = [child for c in started for child in psutil.Process(c.process.pid).children()]
    assert [second.stop(), first.stop(signal.SIGINT), bootstrap.stop()] == [0, 0, 0]
    assert not [daemon for daemon in daemons if daemon.is_running()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model", "--block_indices", "0:2"], "no/such/model"),
        (["MODEL", "--block_indices", "0:9"], "0:6"),
        (["MODEL", "--block_indices", "4-9"], "START:END"),
        (["MODEL", "--block_indices", "4:2"], "4:2"),
        (["MODEL", "--num_blocks", "7"], "0:6"),
        (["MODEL", "--block_indices", "0:2", "--torch_dtype", "float13"], "float13"),
        (["MODEL", "--block_indices", "0:2", "--device", "cuda:7"], "cuda:7"),
        (["MODEL", "--block_indices", "0:2", "--port", "PORT"], "in use"),
        (["EMPTY", "--block_indices", "0:2"], "safetensors"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, llama_folder: Path, arguments: Sequence[str], message: str
) -> None:
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        names = {
            "MODEL": str(llama_folder),
            "EMPTY": str(tmp_path),
            "PORT": str(taken.getsockname()[1]),
        }
        result = _run(*(names.get(item, item) for item in arguments), "--new_swarm")
    assert result.returncode in (1, 2)
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_unreachable_peer_is_one_line(llama_folder: Path) -> None:
    peer = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    result = _run(str(llama_folder), "--block_indices", "0:2", "--initial_peers", peer)
    assert result.returncode == 1
    assert "/ip4/127.0.0.1/tcp/9" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_server_ends_when_its_daemon_dies(
    tmp_path: Path, llama_folder: Path, started: list[Command]
) -> None:
    """Whoever restarts services can restart it, and nobody takes it for a working one."""
    command = Command(
        tmp_path, "run_server", str(llama_folder), "--block_indices", "0:6", "--new_swarm",
        "--host_maddrs", "/ip4/127.0.0.1/tcp/0",
    )  # fmt: skip
    started.append(command)
    command.wait_ready()
    (daemon,) = psutil.Process(command.process.pid).children()
    daemon.kill()
    assert command.process.wait(timeout=30) == 1
    assert command.log.read_text().splitlines()[-1].endswith("this server is off the network")


def test_interrupt_while_starting(
    tmp_path: Path, llama_folder: Path, started: list[Command]
) -> None:
    command = Command(
        tmp_path, "run_server", str(llama_folder), "--block_indices", "0:6", "--new_swarm",
        "--host_maddrs", "/ip4/127.0.0.1/tcp/0",
    )  # fmt: skip
    started.append(command)
    while not psutil.Process(command.process.pid).children():
        assert command.process.poll() is None, command.log.read_text()
        time.sleep(0.01)
    daemons = psutil.Process(command.process.pid).children()
    assert command.stop(signal.SIGINT) in (0, 130)
    assert not [daemon for daemon in daemons if daemon.is_running()]
    assert "Traceback" not in command.log.read_text()
