"""The libp2p daemon of one node: hivemind's `p2pd` child process and the calls made to it.

Everything that touches hivemind's P2P class is here, and its exceptions end here. The daemon's
sockets and the key it reads live in a private folder that is removed with it, so a failed launch
leaves nothing behind either. It listens on TCP only; it relays for others only if asked to.

p2pd ends by itself within a second when this process dies, because its control connection drops.
What is left of a process that was killed is the folder, which the next launch on the machine sees
unlocked and removes.
"""

# ruff: noqa: SLF001  hivemind keeps the process, its client and its tasks private; P2P has no
# public connect(), and its shutdown() leaves tasks behind.

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from planetserve.crypto.identity import Identity, peer_id_bytes
from planetserve.errors import ConfigError, PeerUnreachable, RemoteProtocolError, TransportError
from planetserve.swarm import multiaddr
from planetserve.swarm.libp2p.daemon_launch import ContainedP2P
from planetserve.swarm.libp2p.delimited import read_message, with_length
from planetserve.swarm.libp2p.forks import keep_from_children
from planetserve.swarm.libp2p.sockets import send_all, stop_serving
from planetserve.swarm.node_config import NodeConfig
from planetserve.types import PeerId

logger = logging.getLogger(__name__)

_ERRORS = (P2PDaemonError, P2PHandlerError, RemoteProtocolError, OSError, EOFError)
_EXIT_TIMEOUT_S = 5.0
_SETTLE_ROUNDS = 100
_RETRY_S = 0.01
_MAX_WAITING = 4096
"""Maximum number of streams waiting to be accepted; the daemon drops further ones of any peer."""

Accept = Callable[[PeerId, socket.socket, bytes], None]
"""Takes over an incoming stream: who opened it, its socket, bytes that were read already."""


class Daemon:
    """One p2pd process. `p2p` is hivemind's handle on it, which the DHT needs."""

    def __init__(self) -> None:
        self.p2p: P2P | None = None
        self.resources = contextlib.ExitStack()
        """Closed once the process has ended."""
        self._incoming: set[asyncio.Task[Any]] = set()
        self._folder, self._lock = _make_folder(_parent())
        keep_from_children(self._lock)

    @classmethod
    async def start(cls, config: NodeConfig, identity: Identity) -> Daemon:
        """Launch p2pd and wait until it answers.

        Raises:
            ConfigError: a port is taken, an address cannot be listened on, or there is no place for
                the daemon's sockets.
            TransportError: the daemon did not start.
        """
        check_ports(config.listens_on)
        try:
            daemon = cls()
        except OSError as error:
            raise ConfigError(
                f"cannot make a folder for the libp2p daemon in {_parent()}: {error.strerror}; "
                "make that writable, in a container with --tmpfs /tmp"
            ) from None
        try:
            await daemon._launch(config, identity)
        except BaseException:
            await daemon.close()
            raise
        return daemon

    async def _launch(self, config: NodeConfig, identity: Identity) -> None:
        key_file = self._folder / "identity"
        identity.save(key_file)
        p2p = self.p2p = ContainedP2P(self._folder, self._listen)  # before it can fail
        try:
            async with asyncio.timeout(config.daemon_startup_timeout_s):
                await p2p.launch(config, key_file)
        except TimeoutError:
            limit = f"{config.daemon_startup_timeout_s:g} s (--daemon_startup_timeout)"
            raise _launch_error(f"it did not answer in {limit}") from None
        except _ERRORS as error:
            raise _launch_error(str(error)) from None
        finally:
            # The daemon has read it; a key that nobody keeps should not outlive a crash either.
            key_file.unlink()

    async def _listen(self, p2p: P2P) -> None:
        """Take the streams that the daemon hands over, in hivemind's place: with room for many at
        once, and leaving none open of which the daemon had said nothing yet."""

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is None or self.p2p is None:
                writer.transport.abort()
                return
            self._incoming.add(task)
            try:
                with contextlib.suppress(OSError, EOFError):
                    await p2p._client.control._handler(reader, writer)
            finally:
                self._incoming.discard(task)
                writer.transport.abort()

        path = p2p._client_listen_maddr["unix"]
        server = await asyncio.start_unix_server(take, path=path, backlog=_MAX_WAITING)
        try:
            await asyncio.Future()  # until this is cancelled
        finally:
            await stop_serving(server)

    async def addresses(self, peer_id: PeerId) -> tuple[str, ...]:
        """Multiaddresses at which others may reach this node."""
        suffix = f"/p2p/{peer_id}"
        places = [str(Multiaddr(data)) for data in await self.own_addresses()]
        return tuple(f"{place.removesuffix(suffix)}{suffix}" for place in places)

    async def own_addresses(self) -> list[bytes]:
        """Multiaddresses of this node, as bytes.

        Raises:
            TransportError: the daemon does not answer.
        """
        answer = await self._told(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        return list(answer.identify.addrs)

    async def connected(self) -> list[bytes]:
        """Ids, as bytes, of the peers that there are connections to.

        Raises:
            TransportError: the daemon does not answer.
        """
        answer = await self._told(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return [peer.id for peer in answer.peers]

    async def addresses_of(self, peer: bytes) -> list[bytes]:
        """Multiaddresses, as bytes, that a connected peer has given.

        Raises:
            TransportError: the daemon does not answer, or knows none.
        """
        question = p2pd_pb2.DHTRequest(type=p2pd_pb2.DHTRequest.FIND_PEER, peer=peer, timeout=1)
        answer = await self._told(p2pd_pb2.Request(type=p2pd_pb2.Request.DHT, dht=question))
        return list(answer.dht.peer.addrs)

    async def connect(self, peer_id: PeerId, addresses: Sequence[str], timeout_s: float) -> None:
        """Make sure there is a connection to a peer.

        Raises:
            PeerUnreachable: there is none; with no usable address, peers were asked for one.
        """
        try:
            peer = peer_id_bytes(peer_id)
        except RemoteProtocolError as error:
            raise PeerUnreachable(f"{peer_id[:64]!r} cannot be dialled: {error}") from None
        where = p2pd_pb2.ConnectRequest(peer=peer, addrs=multiaddr.dialable(peer_id, addresses))
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=where)
        try:
            async with asyncio.timeout(timeout_s):
                _, sock = await self._ask(request)
            sock.close()
        except TimeoutError:
            raise PeerUnreachable(f"{peer_id} did not answer in {timeout_s:g} s") from None
        except _ERRORS as error:
            raise PeerUnreachable(f"cannot connect to {peer_id}: {_reason(error)}") from None

    async def open_socket(self, peer_id: PeerId, protocol: str) -> socket.socket:
        """Open a raw stream to a connected peer.

        Raises:
            PeerUnreachable: the peer is not connected or does not serve the protocol.
        """
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer_id_bytes(peer_id), proto=[protocol]),
        )
        try:
            _, sock = await self._ask(request)
        except _ERRORS as error:
            raise PeerUnreachable(f"{peer_id} refused a stream: {_reason(error)}") from None
        return sock

    async def add_protocol(self, protocol: str, accept: Accept) -> None:
        """Hand every incoming stream of `protocol` to `accept`.

        Raises:
            TransportError: the daemon does not answer.
        """

        async def on_stream(
            info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            sock, head = await _take_socket(reader, writer)
            accept(str(info.peer_id), sock, head)

        if self.p2p is None:
            raise TransportError("this node is closed")
        try:
            await self.p2p.add_binary_stream_handler(protocol, on_stream)
        except _ERRORS as error:
            raise TransportError(f"the libp2p daemon does not answer: {_reason(error)}") from None

    async def wait(self) -> int:
        """Wait until the process ends; its exit code."""
        code: int = await self._child.wait()
        return code

    async def close(self) -> None:
        """End the process and everything that waits for it, and remove its folder."""
        p2p, self.p2p = self.p2p, None
        if p2p is not None:
            child, control = p2p._child, p2p._client and p2p._client.control
            if child is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_EXIT_TIMEOUT_S):
                        await p2p.shutdown()
                if child.returncode is None:
                    child.kill()
                    await child.wait()
            for task in self._incoming:
                task.cancel()
            await asyncio.gather(*self._incoming, return_exceptions=True)
            await _settle(p2p, control)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()
        self.resources.close()

    async def _told(self, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
        try:
            answer, sock = await self._ask(request)
        except _ERRORS as error:
            raise TransportError(f"the libp2p daemon does not answer: {_reason(error)}") from None
        sock.close()
        return answer

    async def _ask(self, request: p2pd_pb2.Request) -> tuple[p2pd_pb2.Response, socket.socket]:
        """Send one request on a connection of its own; the answer and the connection.

        hivemind's client does the same but leaves its connection open when a request fails.
        """
        if self.p2p is None:
            raise TransportError("this node is closed")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await _connect_unix(sock, self.p2p._daemon_listen_maddr["unix"])
            await send_all(sock, with_length(request))
            message, _ = await read_message(sock, b"", DEFAULT_MAX_MSG_SIZE)
            answer = p2pd_pb2.Response.FromString(message)
            if answer.type == p2pd_pb2.Response.ERROR:
                raise P2PDaemonError(answer.error.msg)
        except BaseException:
            sock.close()
            raise
        return answer, sock

    @property
    def _child(self) -> Any:
        if self.p2p is None or self.p2p._child is None:
            raise TransportError("this node is closed")
        return self.p2p._child


def _parent() -> Path:
    """Where nodes make their folders. Unix socket paths are short; TMPDIR need not be."""
    return Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())


def _make_folder(parent: Path) -> tuple[Path, BinaryIO]:
    """A private folder and the lock on it, after removing the folders of processes that died."""
    for left in parent.glob("planetserve-*"):
        # Too deep for `rmtree`: nothing of ours is.
        with contextlib.suppress(OSError, RecursionError):
            _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=f"planetserve-{os.getpid()}-", dir=parent))
    # Locked before it has its name, so that nobody sees it unlocked.
    held = (folder / "new").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")
    return folder, held


def _remove_if_left(folder: Path) -> None:
    """Remove the folder of a process of this user that has ended.

    The parent belongs to everybody, and so may what has such a name there: a pipe in the place of
    the lock would have whoever opens it wait.

    Raises:
        OSError: it is somebody's or in use, or it cannot be removed.
    """
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    lock = os.open(folder / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(lock).st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    finally:
        os.close(lock)


async def _settle(p2p: P2P, control: Any) -> None:
    """Let hivemind's own tasks end: those that serve the daemon and those that await its answers.

    hivemind keeps no list of the tasks it starts (pings, stores, look-ups). All of them end when
    the calls they wait for fail, and each handles that failure.
    """
    tasks = [p2p._reader_task, p2p._listen_task]
    if control is not None:
        tasks += [control._read_task, control._write_task, *control._handler_tasks.values()]
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for _ in range(_SETTLE_ROUNDS if control is not None else 0):
        for call in list(control._pending_calls.values()):
            if not call.done():
                call.set_exception(P2PDaemonError("the node was closed"))
        await asyncio.sleep(0)


async def _connect_unix(sock: socket.socket, path: str) -> None:
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_RETRY_S)  # the daemon's queue of connections is full
        else:
            return


async def _take_socket(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[socket.socket, bytes]:
    """The socket below a pair of asyncio streams, and what the reader holds already."""
    transport = cast(asyncio.Transport, writer.transport)
    transport.pause_reading()
    reader.feed_eof()
    head = await reader.read()
    sock: socket.socket = writer.get_extra_info("socket").dup()
    transport.abort()
    return sock, head


def check_ports(addresses: Sequence[str]) -> None:
    """Refuse ports that another process listens on: libp2p would share them without a word.

    Raises:
        ConfigError: a port is taken or not allowed, or an address is not one of this machine.
    """
    for text in addresses:
        address = multiaddr.parse(text)
        family = socket.AF_INET6 if address.kind == "ip6" else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((address.host, address.port))
                sock.listen(1)
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and len(addresses) > 1:
                continue  # no IPv6 here; the other addresses will do
            raise ConfigError(
                f"cannot listen on {text}: {error.strerror}; choose another port or address"
            ) from None


def _launch_error(text: str) -> TransportError | ConfigError:
    line = " ".join(text.split())[:300]
    if "listen" in line:
        return ConfigError(f"the libp2p daemon cannot listen: {line}")
    return TransportError(f"the libp2p daemon did not start: {line}")


def _reason(error: BaseException) -> str:
    """The telling end of the daemon's many-line messages."""
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return last[0].strip(" *").removeprefix("Connect failed. msg=")[:200]
