"""`python -m planetserve.run_dht` as a process: joining through it, its errors, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from planetserve.crypto.identity import Identity
from planetserve.errors import ConfigError
from planetserve.run_dht import parse
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode

COMMAND = [sys.executable, "-W", "ignore", "-m", "planetserve.run_dht"]
LOOPBACK = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0"]


class Bootstrap:
    """A running bootstrap peer."""

    def __init__(self, folder: Path, arguments: Sequence[str] = ()):
        self.ready_file = folder / f"ready-{time.monotonic_ns()}.json"
        self.process = subprocess.Popen(
            [*COMMAND, *LOOPBACK, "--ready-file", str(self.ready_file), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready: dict[str, Any] = {}

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 50
        while not self.ready_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(self.process.communicate(timeout=5)[1])
            time.sleep(0.05)
        self.ready = json.loads(self.ready_file.read_text())

    def daemons(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def bootstrap(folder: Path) -> Iterator[Bootstrap]:
    peer = Bootstrap(folder, ["--identity_path", str(folder / "id")])
    peer.wait_until_ready()
    yield peer
    if peer.process.poll() is None:
        peer.process.kill()
    peer.process.communicate(timeout=10)


async def test_others_join_with_what_it_prints(bootstrap: Bootstrap) -> None:
    (address,) = bootstrap.ready["addresses"]
    assert bootstrap.ready["pid"] == bootstrap.process.pid
    assert address.endswith(f"/p2p/{bootstrap.ready['peer_id']}")
    config = NodeConfig(initial_peers=tuple(bootstrap.ready["addresses"]), client_mode=True)
    async with await SwarmNode.start(config):
        pass
    bootstrap.process.send_signal(signal.SIGTERM)
    output, errors = bootstrap.process.communicate(timeout=30)
    assert bootstrap.process.returncode == 0, errors
    assert f"--initial_peers {address}\n" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_daemon(bootstrap: Bootstrap, number: signal.Signals) -> None:
    daemons = bootstrap.daemons()
    assert [daemon.name() for daemon in daemons] == ["p2pd"]
    bootstrap.process.send_signal(number)
    _, errors = bootstrap.process.communicate(timeout=30)
    assert bootstrap.process.returncode == 0
    assert "Traceback" not in errors
    assert not [daemon for daemon in daemons if daemon.is_running()]
    assert not list(Path("/tmp").glob(f"planetserve-{bootstrap.process.pid}-*"))


def test_its_daemon_ends_when_it_is_killed(bootstrap: Bootstrap) -> None:
    daemons = bootstrap.daemons()
    bootstrap.process.kill()
    bootstrap.process.communicate(timeout=10)
    _, alive = psutil.wait_procs(daemons, timeout=40)
    assert not alive


def test_it_ends_when_its_daemon_dies(bootstrap: Bootstrap) -> None:
    for daemon in bootstrap.daemons():
        daemon.kill()
    _, errors = bootstrap.process.communicate(timeout=30)
    assert bootstrap.process.returncode == 1
    assert errors.splitlines()[-1].endswith("this peer is off the network")


def test_a_signal_during_the_start_ends_it(folder: Path) -> None:
    peer = Bootstrap(folder)
    deadline = time.monotonic() + 50
    while not peer.daemons() and time.monotonic() < deadline:
        time.sleep(0.01)
    daemons = peer.daemons()
    peer.process.send_signal(signal.SIGTERM)
    _, errors = peer.process.communicate(timeout=30)
    assert peer.process.returncode == 0, errors
    assert not [daemon for daemon in daemons if daemon.is_running()]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=50
    )


def test_errors_are_one_line(folder: Path) -> None:
    nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"
    (folder / "rsa").write_bytes(bytes.fromhex("080012") + bytes(300))
    for arguments, code, words in (
        ([*LOOPBACK, "--initial_peers", nobody], 1, nobody),
        (["--host_maddrs", "/ip4/127.0.0.1/udp/1/quic-v1"], 2, "only TCP"),
        ([*LOOPBACK, "--identity_path", str(folder / "rsa")], 2, "RSA key"),
        ([*LOOPBACK, "--ready_file", str(folder / "missing" / "f")], 2, "--ready_file"),
    ):
        done = run(*arguments)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_help_does_not_load_the_network() -> None:
    code = """
import atexit, sys
from planetserve import run_dht
atexit.register(lambda: print("hivemind" in sys.modules))
run_dht.main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--initial_peers" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


class TestArguments:
    """Reading the command line, without starting anything."""

    def test_both_spellings(self) -> None:
        assert parse(["--ready-file", "f"]).ready_file == "f"
        assert parse(["--ready_file", "f", "--port", "31337"]).port == 31337

    def test_flags_win_over_the_file(self, folder: Path) -> None:
        path = folder / "dht.yaml"
        path.write_text("port: 31337\nlog-level: debug\n")
        assert parse(["-c", os.fspath(path)]).port == 31337
        config = parse(["-c", os.fspath(path), "--host_maddrs", "/ip4/127.0.0.1/tcp/0"])
        assert (config.port, config.log_level) == (0, "debug")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--initial_peer", "x"], "did you mean '--initial_peers'"),
            (["--log_level", "loud"], "not one of"),
            (["--port", "x"], "a whole number"),
            (["--daemon_startup_timeout", "0"], "greater than 0"),
        ],
    )
    def test_mistakes_are_explained(self, arguments: list[str], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            parse(arguments)
