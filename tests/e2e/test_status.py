"""`planetserve status` on a real swarm, whole and then not, and at a real terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT
from terminals import CTRL_C, Terminal

from planetserve import cli
from planetserve.commands import status
from planetserve.errors import ConfigError, PeerUnreachable
from planetserve.testing.swarm import LocalSwarm

pytestmark = pytest.mark.timeout(120)

DEAD_PEER = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWGRUVh8Ci1PjtC1dgVd1wQDMkPvmdnFhLKXTkMpAUyXfM"


def read(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status.main([*arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def fading(llama_folder: Path) -> Iterator[LocalSwarm]:
    """A swarm that tests may take servers from."""
    with LocalSwarm(str(llama_folder), ("0:2", "2:5", "4:6")) as running:
        yield running


def test_a_whole_swarm(
    swarm: LocalSwarm, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = ("--initial_peers", *swarm.initial_peers)
    found = read(capsys, str(llama_folder), *peers)
    spans = {server.node.peer_id: str(server.info().span) for server in swarm.servers}
    assert {one["peer_id"]: f"{one['start']}:{one['end']}" for one in found["servers"]} == spans
    assert found["healthy"]
    assert found["copies"] == [1, 1, 1, 1, 2, 1]
    assert all(one["rtt_ms"] > 0 for one in found["servers"])
    assert "addresses" not in found["servers"][0]
    named = read(capsys, found["prefix"], *peers, "--addresses")
    assert named["num_blocks"] == 6
    assert named["fingerprint"] == found["fingerprint"]
    first = named["servers"][0]["addresses"][0]
    assert first["connects"]
    assert first["address"].endswith(named["servers"][0]["peer_id"])
    (listed,) = read(capsys, *peers)["models"]
    assert (listed["prefix"], listed["healthy"], listed["servers"]) == (found["prefix"], True, 3)


def test_text_into_a_pipe_has_no_escape_sequences(
    swarm: LocalSwarm, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status.main([str(llama_folder), "--initial_peers", *swarm.initial_peers])
    text = capsys.readouterr().out
    assert "every block is served" in text
    assert "\x1b" not in text
    assert swarm.initial_peers[0] not in text


def test_another_model_is_not_there(swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ("--initial_peers", *swarm.initial_peers)
    found = read(capsys, "demo", *peers)
    assert found["missing"] == [[0, 8]]
    assert found["other_models"]
    with pytest.raises(ConfigError, match="no server of 'llama-0000deadbeef'.*serves llama-"):
        status.main(["llama-0000deadbeef", *peers])


def test_a_dead_peer_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no --initial_peers given"):
        status.main(["demo"])
    with pytest.raises(PeerUnreachable, match="no initial peer answered"):
        status.main(["demo", "--initial_peers", DEAD_PEER])
    assert capsys.readouterr().out == ""


def test_a_server_that_dies_and_one_that_leaves(
    fading: LocalSwarm, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(llama_folder), "--initial_peers", *fading.initial_peers)
    last = next(server for server in fading.servers if server.info().span.end == 6)
    fading.call(last.node.close())  # as if killed: its record stays
    found = read(capsys, *arguments)
    assert found["missing"] == []
    assert found["unanswered"] == [[5, 6]]
    dead = next(one for one in found["servers"] if one["peer_id"] == last.node.peer_id)
    assert dead["answers"] is False
    first = next(server for server in fading.servers if server.info().span.start == 0)
    fading.stop_server(first)
    found = read(capsys, *arguments)
    assert found["missing"] == [[0, 2]]
    assert found["healthy"] is False
    assert len(found["servers"]) == 2


def test_watch_writes_a_document_on_a_line(swarm: LocalSwarm, llama_folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "planetserve.commands.status", str(llama_folder), "--watch",
         "--period", "1", "--json", "--initial_peers", *swarm.initial_peers],
        stdout=subprocess.PIPE, env=ENVIRONMENT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert all(json.loads(process.stdout.readline())["healthy"] for _ in range(2))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_watch_at_a_terminal_until_ctrl_c(swarm: LocalSwarm, llama_folder: Path) -> None:
    terminal = Terminal(
        "-m", "planetserve.commands.status", str(llama_folder), "--watch", "--period", "1",
        "--initial_peers", *swarm.initial_peers,
    )  # fmt: skip
    try:
        while terminal.output.count("every block is served") < 2:
            assert os.waitpid(terminal.pid, os.WNOHANG) == (0, 0), terminal.output
            time.sleep(0.05)
        terminal.press(CTRL_C)
        assert terminal.end() == 0
        assert "Traceback" not in terminal.output
    finally:
        terminal.destroy()


def test_the_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._dispatch(["--help"])
    assert "planetserve.commands" not in capsys.readouterr().out
