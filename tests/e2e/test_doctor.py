"""`planetserve doctor` names each fault that is planted here, and none where there is none."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT

from planetserve.clock import SystemClock
from planetserve.commands import doctor, machine_checks
from planetserve.commands.doctor import DoctorConfig, examine
from planetserve.commands.findings import Finding
from planetserve.errors import ConfigError
from planetserve.model.checkpoint import Checkpoint
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.proxy import Link, LinkProxy
from planetserve.testing.swarm import LocalSwarm

pytestmark = pytest.mark.timeout(120)

DEAD_PEER = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWGRUVh8Ci1PjtC1dgVd1wQDMkPvmdnFhLKXTkMpAUyXfM"


class WrongClock(SystemClock):
    """Ten minutes ahead."""

    def unix(self) -> float:
        return super().unix() + 600.0


def findings(clock: SystemClock | None = None, **settings: Any) -> list[Finding]:
    return list(examine(DoctorConfig(**{"no_generation": True, **settings}), clock))


def one(found: list[Finding], check: str) -> Finding:
    return next(finding for finding in found if finding.check == check)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        number: int = sock.getsockname()[1]
        return number


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("demo", ("0:8",)) as running:
        yield running


@pytest.fixture
def own_swarm(llama_folder: Path) -> Iterator[LocalSwarm]:
    """A swarm of blocks 0:3 alone."""
    with LocalSwarm(str(llama_folder), ("0:3",)) as running:
        yield running


def test_a_healthy_swarm_and_machine(
    demo_swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.main(["demo", "--json", "--initial_peers", *demo_swarm.initial_peers])
    document = json.loads(capsys.readouterr().out)
    assert document["faults"] == 0
    verdicts = {found["check"]: found["verdict"] for found in document["findings"]}
    for check in ("clock", "directory", "blocks", "links", "generation", "memory", "device"):
        assert verdicts[check] == "ok", document
    generation = next(found for found in document["findings"] if found["check"] == "generation")
    assert "tokens/s" in generation["detail"]


def test_a_fault_ends_with_code_1_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--initial_peers", DEAD_PEER])
    assert caught.value.code == 1
    text = capsys.readouterr().out
    assert "127.0.0.1 port 9: " in text
    assert "-> that peer is gone" in text
    assert "1 fault found" in text


def test_a_dead_bootstrap_peer_among_others(demo_swarm: LocalSwarm) -> None:
    found = findings(initial_peers=(DEAD_PEER, *demo_swarm.initial_peers))
    assert ("peers", "warning") in {(each.check, each.verdict) for each in found}
    assert one(found, "directory").verdict == "ok"


def test_a_clock_ten_minutes_off(demo_swarm: LocalSwarm) -> None:
    found = findings(WrongClock(), initial_peers=demo_swarm.initial_peers)
    assert one(found, "clock").verdict == "fault"
    assert "600 s ahead of" in one(found, "clock").detail
    assert "timedatectl" in one(found, "clock").advice


def test_a_missing_block(own_swarm: LocalSwarm, llama_folder: Path) -> None:
    found = findings(model=str(llama_folder), initial_peers=own_swarm.initial_peers)
    assert one(found, "blocks").verdict == "fault"
    assert "blocks 3:6 of " in one(found, "blocks").detail
    assert "--block_indices 3:6" in one(found, "blocks").advice


def test_a_wrong_revision(own_swarm: LocalSwarm, tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, "llama", seed=2, num_hidden_layers=6)
    found = findings(model=str(tmp_path), initial_peers=own_swarm.initial_peers)
    assert one(found, "revision").verdict == "fault"
    assert "--revision" in one(found, "revision").advice


def test_a_server_whose_port_is_closed(own_swarm: LocalSwarm, llama_folder: Path) -> None:
    own_swarm.add_server("3:6", announce_maddrs=("/ip4/127.0.0.1/tcp/9",))
    found = findings(model=str(llama_folder), initial_peers=own_swarm.initial_peers)
    assert one(found, "servers").verdict == "fault"
    assert "blocks 3:6 have no other" in one(found, "servers").detail
    assert "port is forwarded" in one(found, "servers").advice


def test_a_slow_link(own_swarm: LocalSwarm, llama_folder: Path) -> None:
    port = free_port()
    link = Link(delay_s=0.2)
    proxy = own_swarm.call(LinkProxy.start(("127.0.0.1", port), lambda _: link))
    try:
        own_swarm.add_server(
            "3:6", host_maddrs=(f"/ip4/127.0.0.1/tcp/{port}",),
            announce_maddrs=(f"/ip4/127.0.0.1/tcp/{proxy.address[1]}",),
        )  # fmt: skip
        found = findings(
            model=str(llama_folder), initial_peers=own_swarm.initial_peers, ping_timeout=30.0
        )
    finally:
        own_swarm.call(proxy.close())
    assert one(found, "links").verdict == "warning"
    assert one(found, "blocks").verdict == "ok"


def test_a_server_of_another_protocol_version(
    own_swarm: LocalSwarm, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planetserve.wire.protocols.OLDEST_VERSION", 2)
    monkeypatch.setattr("planetserve.wire.protocols.PROTOCOL_VERSION", 2)
    own_swarm.add_server("3:6")
    found = findings(model=str(llama_folder), initial_peers=own_swarm.initial_peers)
    assert one(found, "protocol").verdict == "fault"
    assert "speaks protocol version 2 at least" in one(found, "protocol").detail
    assert "same version of planetserve" in one(found, "protocol").advice


def test_a_port_where_nobody_speaks_the_protocol() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        peer = DEAD_PEER.replace("/tcp/9/", f"/tcp/{port}/")
        found = findings(initial_peers=(peer,), connect_timeout=1.0)
    assert one(found, "peers").verdict == "ok"
    assert one(found, "directory").verdict == "fault"


def test_no_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000")
    (tmp_path / "memory.current").write_text("900000000000")
    (found,) = machine_checks.memory(Checkpoint.open("demo"), "cpu", tmp_path)
    assert found.verdict == "fault"
    assert "0 of 8 blocks fit" in found.detail
    (found,) = machine_checks.memory(None, "cpu", tmp_path)
    assert found.verdict == "fault"
    (found,) = machine_checks.memory(Checkpoint.open("demo"), "cpu", tmp_path / "no container")
    assert found.verdict == "ok"


def test_a_full_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    (found,) = machine_checks.disk(tmp_path / "not" / "yet", 2 * free, "downloads")
    assert found.verdict == "fault"
    assert "need" in found.detail


LIMITED = """
import resource, sys
resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]),) * 2)
from planetserve import cli
cli.main(["doctor"])
"""


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("RLIMIT_FSIZE", "0", "no temporary folder can be written"),
        ("RLIMIT_NOFILE", "200", "only 200 files may be open"),
    ],
)
def test_what_the_system_does_not_allow(limit: str, value: str, words: str, tmp_path: Path) -> None:
    """As on a full disk, and with too few descriptors; and the command says so on a pipe."""
    assert hasattr(resource, limit)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, limit, value],
        capture_output=True, text=True, check=False,
        env={**ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert words in done.stdout
    assert "\x1b" not in done.stdout


def test_a_port_that_is_taken_and_one_that_leads_nowhere() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        taken = listener.getsockname()[1]
        (found,) = machine_checks.port(taken, None)
        assert found.verdict == "fault"
    number = free_port()
    # Nothing listens there by IPv6.
    ours, outside = machine_checks.port(number, "::1")
    assert (ours.verdict, outside.verdict) == ("ok", "fault")
    assert "forward TCP port" in outside.advice
    assert [found.verdict for found in machine_checks.port(number, "127.0.0.1")] == ["ok", "ok"]


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=99", "no-such-package-of-ours>=1", "numpy"]
    monkeypatch.setattr(machine_checks.metadata, "requires", lambda _: needs)
    (found,) = machine_checks.versions()
    assert found.verdict == "fault"
    assert "torch>=99 (there is " in found.detail
    assert "no-such-package-of-ours>=1 (not installed)" in found.detail
    assert "numpy" not in found.detail


def test_a_folder_that_cannot_be_written() -> None:
    if os.geteuid() == 0:
        folder = Path("/proc/self")  # where not even root may
    else:
        folder = Path("/root")
    (found,) = machine_checks.disk(folder, 0, "downloads")
    assert found.verdict == "fault"


def test_wrong_names_and_settings(demo_swarm: LocalSwarm) -> None:
    found = findings(model="no-such-folder", initial_peers=demo_swarm.initial_peers)
    assert one(found, "model").verdict == "fault"
    assert one(found, "directory").verdict == "ok"
    found = findings(model="llama-0123456789ab", initial_peers=demo_swarm.initial_peers)
    assert "no server of" in one(found, "model").detail
    assert one(findings(initial_peers=("/ip4/1",)), "peers").verdict == "fault"
    with pytest.raises(ConfigError, match="--public_ip needs --port"):
        DoctorConfig(public_ip="203.0.113.5")
