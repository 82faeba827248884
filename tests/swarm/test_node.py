"""Starting, joining, failing to, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from swarm_helpers import LOOPBACK, StartNode, make_info, until

from planetserve.clock import SystemClock
from planetserve.crypto.identity import Identity
from planetserve.errors import ConfigError, PeerUnreachable, TransportError
from planetserve.swarm.dht import operations
from planetserve.swarm.directory import Directory
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.libp2p import node as node_module
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.swarm.libp2p.streams import FrameStream
from planetserve.swarm.ping import ping, serve_ping, whom_to_ping

PEER = Identity.generate().peer_id


def daemons() -> set[int]:
    """This process's p2pd children."""
    return {child.pid for child in psutil.Process().children() if child.name() == "p2pd"}


def folders() -> set[Path]:
    return set(Path("/tmp").glob(f"planetserve-{os.getpid()}-*"))


def descriptors() -> int:
    return psutil.Process().num_fds()


def flags_of(node: SwarmNode) -> list[str]:
    return psutil.Process(node._daemon._child.pid).cmdline()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initial_peers": ("localhost:31337",)}, "not a multiaddress"),
        ({"initial_peers": ("/ip4/127.0.0.1/tcp/31337",)}, "where and who"),
        ({"initial_peers": "/ip4/127.0.0.1/tcp/1"}, "a list"),
        ({"host_maddrs": ("/ip4/127.0.0.1/udp/0/quic-v1",)}, "only TCP"),
        ({"host_maddrs": ("/dns4/localhost/tcp/0",)}, "/ip4/ or /ip6/"),
        ({"announce_maddrs": ("/ip4/192.0.2.7/tcp/0",)}, "port 0"),
        ({"announce_maddrs": (f"/ip4/192.0.2.7/tcp/1/p2p/{PEER}",)}, "leave out /p2p/"),
        ({"port": 70000}, "not a TCP port"),
        ({"port": 31337, "host_maddrs": LOOPBACK}, "exclude each other"),
        ({"public_ip": "192.0.2.7"}, "needs --port"),
        ({"public_ip": "example.org", "port": 1}, "not a host"),
        ({"public_ip": "192.0.2.7", "port": 1, "announce_maddrs": LOOPBACK}, "port 0|exclude"),
        ({"client_mode": True, "port": 31337}, "listens nowhere"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NodeConfig(**options)


def test_a_public_address_is_announced_with_the_port() -> None:
    assert NodeConfig(public_ip="192.0.2.7", port=31337).announced == ("/ip4/192.0.2.7/tcp/31337",)
    assert NodeConfig(public_ip="2001:db8::7", port=1).announced == ("/ip6/2001:db8::7/tcp/1",)
    assert NodeConfig(port=31337).listens_on == ("/ip4/0.0.0.0/tcp/31337", "/ip6/::/tcp/31337")


async def test_what_a_node_says_of_itself(start_node: StartNode, tmp_path: Path) -> None:
    path = tmp_path / "id"
    node = await start_node(identity_path=path)
    assert node.peer_id == Identity.load_or_create(path).peer_id
    (address,) = node.addresses()
    assert address.startswith("/ip4/127.0.0.1/tcp/")
    assert address.endswith(f"/p2p/{node.peer_id}")
    announced = await start_node(announce_maddrs=("/ip4/192.0.2.7/tcp/31337",))
    assert announced.addresses() == (f"/ip4/192.0.2.7/tcp/31337/p2p/{announced.peer_id}",)


async def test_tcp_only_and_no_relay(start_node: StartNode) -> None:
    node = await start_node()
    flags = flags_of(node)
    assert {"-relay=0", "-relayService=0", "-autoRelay=0", "-autonat=0"} <= set(flags)
    assert "-natPortMap=0" in flags, "nothing to map on loopback"
    assert not [flag for flag in flags if "quic" in flag or "udp" in flag]
    inodes = {c.laddr.port for c in psutil.Process(node._daemon._child.pid).net_connections("udp")}
    assert not inodes
    relaying = await start_node(node, use_relay=True)
    assert {"-relay=1", "-relayService=1"} <= set(flags_of(relaying))


FEW_FILES = """
import asyncio, resource, sys
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))
    async with await SwarmNode.start(NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",))) as node:
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], node._incoming.max_streams)
asyncio.run(main())
"""


@pytest.mark.parametrize(("most_files", "num_streams"), [(600, 150), (18_000, 4096)])
def test_a_node_may_open_all_the_files_it_can(most_files: int, num_streams: int) -> None:
    """Usually a process may open few files, which one peer's streams would use up."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(most_files)], capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(most_files), str(num_streams)]


async def test_the_key_is_not_left_on_disk(start_node: StartNode) -> None:
    node = await start_node()
    folder = node._daemon._folder
    assert folder.stat().st_mode & 0o077 == 0
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
    assert files == {"lock": b""}


async def test_closing_ends_streams_that_the_daemon_has_said_nothing_of(
    start_node: StartNode,
) -> None:
    node = await start_node()
    await serve_ping(node)
    assert node._daemon.p2p is not None
    path = node._daemon.p2p._client_listen_maddr["unix"]
    reader, writer = await asyncio.open_unix_connection(path)
    await until(lambda: bool(node._daemon._incoming))
    await node.close()
    assert await reader.read() == b""
    assert not node._daemon._incoming
    writer.close()
    await writer.wait_closed()


async def test_closing_leaves_nothing(start_node: StartNode) -> None:
    del start_node  # this test closes its nodes itself
    before = (daemons(), folders(), threading.active_count(), len(asyncio.all_tasks()))
    num_descriptors = descriptors()
    nodes = [await SwarmNode.start(NodeConfig(host_maddrs=LOOPBACK))]
    for _ in range(2):
        config = NodeConfig(host_maddrs=LOOPBACK, initial_peers=nodes[0].addresses())
        nodes.append(await SwarmNode.start(config))
    await asyncio.gather(*map(serve_ping, nodes))
    directory = Directory(nodes[1], SystemClock())
    await directory.announce(make_info(nodes[1].identity), 60)
    stream = await nodes[2].open_stream(nodes[1].peer_id, (), "/planetserve/ping/1", 10)
    looking = asyncio.create_task(directory.lookup("tiny"))
    await asyncio.sleep(0)
    assert len(daemons() - before[0]) == 3
    for node in nodes:
        await node.close()
        await node.close()
        assert node.stopped.is_set()
    assert stream.closed
    with contextlib.suppress(TransportError):
        await looking
    assert (daemons(), folders(), threading.active_count(), len(asyncio.all_tasks())) == before
    assert descriptors() <= num_descriptors


async def test_a_failed_start_leaves_nothing() -> None:
    before = (daemons(), folders(), threading.active_count(), len(asyncio.all_tasks()))
    for options in (
        {"host_maddrs": ("/ip4/192.0.2.1/tcp/0",)},
        {"host_maddrs": LOOPBACK, "initial_peers": (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}",)},
        {"host_maddrs": LOOPBACK, "daemon_startup_timeout_s": 0.001},
    ):
        with pytest.raises((ConfigError, TransportError)):
            await SwarmNode.start(NodeConfig(**options))
    cancelled = asyncio.create_task(SwarmNode.start(NodeConfig(host_maddrs=LOOPBACK)))
    await asyncio.sleep(0.05)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert (daemons(), folders(), threading.active_count(), len(asyncio.all_tasks())) == before


async def test_a_port_in_use_is_refused(start_node: StartNode) -> None:
    """libp2p itself would share the port of another node of this machine without a word."""
    node = await start_node()
    taken = node.addresses()[0].partition("/p2p/")[0]
    with pytest.raises(ConfigError, match="in use.*choose another port"):
        await start_node(host_maddrs=(taken,))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="in use"):
            await start_node(host_maddrs=(f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}",))


async def test_unreachable_initial_peers_are_listed(start_node: StartNode) -> None:
    with socket.socket() as silent:
        # Accepts connections and never says a word.
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        places = (
            f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}",
            f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{Identity.generate().peer_id}",
        )
        started = time.monotonic()
        with pytest.raises(PeerUnreachable) as caught:
            await start_node(initial_peers=places, connect_timeout_s=1.0)
        assert time.monotonic() - started < 30
    assert all(place in str(caught.value) for place in places)
    assert "refused" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_one_initial_peer_that_answers_is_enough(start_node: StartNode) -> None:
    first = await start_node()
    closed = f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"
    node = await start_node(initial_peers=(closed, *first.addresses()))
    assert operations.knows(node.dht, first.peer_id)


async def test_one_key_runs_once(start_node: StartNode, tmp_path: Path) -> None:
    node = await start_node(identity_path=tmp_path / "id")
    with pytest.raises(ConfigError, match="used by another running node"):
        await start_node(identity_path=tmp_path / "id")
    await node.close()
    again = await start_node(identity_path=tmp_path / "id")
    assert again.peer_id == node.peer_id


async def test_the_death_of_the_daemon_is_noticed(start_node: StartNode) -> None:
    server, client = await start_node(), await start_node()
    await serve_ping(server)
    stream = await client.open_stream(server.peer_id, server.addresses(), "/planetserve/ping/1", 10)
    client._daemon._child.kill()
    async with asyncio.timeout(10):
        await client.stopped.wait()
    with pytest.raises(TransportError):
        await stream.receive(10)
    with pytest.raises(TransportError):
        await client.open_stream(server.peer_id, server.addresses(), "/planetserve/ping/1", 5)
    with pytest.raises(TransportError):
        _ = client.dht


async def test_a_restarted_bootstrap_peer_is_found_again(
    start_node: StartNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "_REJOIN_PERIOD_S", 0.5)
    first = await start_node(identity_path=tmp_path / "id")
    node = await start_node(first)
    place = first.addresses()[0].partition("/p2p/")[0]
    await first.close()
    view = Directory(node, SystemClock())
    assert await view.lookup("tiny") == []
    assert not operations.knows(node.dht, first.peer_id), "silent peers are dropped"
    again = await start_node(identity_path=tmp_path / "id", host_maddrs=(place,))
    # libp2p waits some seconds before it dials an address again that has just failed.
    await until(lambda: operations.knows(again.dht, node.peer_id), timeout_s=45)
    await view.announce(make_info(node.identity), 60)
    assert len(await Directory(again, SystemClock()).lookup("tiny")) == 1


async def test_pings(start_node: StartNode) -> None:
    server = await start_node()
    client = await start_node(client_mode=True)
    await serve_ping(server)
    rtt_ms = await ping(client, server.peer_id, server.addresses(), timeout_s=10)
    assert 0 < rtt_ms < 10_000
    assert 0 < await ping(server, server.peer_id, (), timeout_s=10) < 10_000
    with pytest.raises(PeerUnreachable):
        await ping(server, client.peer_id, (), timeout_s=10)
    await until(lambda: not server.streams and not client.streams)


async def test_a_client_can_be_streamed_to(start_node: StartNode) -> None:
    """Over the connection it made: a client listens nowhere, and nobody can dial it."""
    server = await start_node()
    client = await start_node(server, client_mode=True)
    assert client.addresses() == ()
    heard = asyncio.Event()

    async def hear(stream: FrameStream) -> None:
        heard.set()

    await client.serve_streams("/test/hear/1", hear)
    await server.open_stream(client.peer_id, (), "/test/hear/1", 10)
    async with asyncio.timeout(10):
        await heard.wait()


def test_a_loop_in_another_thread() -> None:
    """How a client runs it: the caller's thread has no loop at all."""
    result: list[object] = []

    async def scenario() -> None:
        async with (
            await SwarmNode.start(NodeConfig(host_maddrs=LOOPBACK)) as server,
            await SwarmNode.start(
                NodeConfig(client_mode=True, initial_peers=server.addresses())
            ) as client,
        ):
            await serve_ping(server)
            result.append(await ping(client, server.peer_id, server.addresses(), 10))
            result.append(await Directory(client, SystemClock()).models())

    before = daemons()
    thread = threading.Thread(target=lambda: asyncio.run(scenario()))
    thread.start()
    thread.join(timeout=50)
    assert len(result) == 2
    assert result[1] == {}
    assert daemons() == before


class ManualClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now


def test_round_trip_times_are_averaged_bounded_and_forgotten() -> None:
    clock = ManualClock()
    table = PeerEwma(max_peers=2, clock=clock, max_age_s=100)
    assert table.get("a") is None
    table.add("a", 10.0)
    table.add("a", 20.0)
    assert 10.0 < table.snapshot()["a"] < 20.0
    clock.now = 50.0
    table.add("b", 5.0)
    table.add("c", 6.0)
    assert table.snapshot() == {"b": 5.0, "c": 6.0}
    clock.now = 151.0
    assert table.get("b") is None
    assert table.snapshot() == {}


def choose(names: list[str], rtt: PeerEwma, rng: random.Random) -> list[str]:
    return whom_to_ping(names, rtt, most=8, keep=32, rng=rng)


def test_few_candidates_are_all_pinged_in_every_round() -> None:
    rtt = PeerEwma(128, ManualClock())
    names = [f"s{number}" for number in range(8)]
    for _ in range(3):
        chosen = choose(names, rtt, random.Random(1))
        assert set(chosen) == set(names)
        for name in chosen:
            rtt.add(name, 5.0)


def test_many_candidates_are_searched_while_the_nearest_stay_fresh() -> None:
    clock, rng = ManualClock(), random.Random(2)
    rtt = PeerEwma(128, clock)
    names = [f"s{number}" for number in range(200)]
    distance = {name: float(1 + rng.randrange(200)) for name in names}
    pinged: set[str] = set()
    for _ in range(60):
        chosen = choose(names, rtt, rng)
        assert len(set(chosen)) == 8
        for name in chosen:
            rtt.add(name, distance[name])
        pinged |= set(chosen)
        clock.now += 60.0
    assert len(pinged) > 150
    nearest = sorted(names, key=lambda name: distance[name])
    found = sorted(rtt.snapshot(), key=lambda name: distance[name])[:32]
    # Not all of the nearest were found again in time, but few far ones took their place.
    assert len(set(found) & set(nearest[:64])) > 20


def test_folders_of_killed_processes_are_removed_and_others_not() -> None:
    dead = Path(tempfile.mkdtemp(prefix="planetserve-0-", dir="/tmp"))
    starting = Path(tempfile.mkdtemp(prefix="planetserve-0-", dir="/tmp"))
    (dead / "lock").touch()
    (dead / "p2pd.sock").touch()
    first = node_module.Daemon()
    second = node_module.Daemon()
    assert not dead.exists()
    assert starting.exists(), "it has no lock yet"
    assert first._folder.exists()
    for daemon in (first, second):
        asyncio.run(daemon.close())
    starting.rmdir()


def test_socket_paths_stay_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unix socket paths end at about 100 characters, and TMPDIR may be longer than that."""
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path / ("x" * 120)))
    daemon = node_module.Daemon()
    assert len(os.fspath(daemon._folder)) < 40
    asyncio.run(daemon.close())
    assert not daemon._folder.exists()
