"""The data path: persistent byte streams between two peers, carrying frames (`wire/frame.py`).

A stream is a libp2p stream that the daemon hands over as a unix socket. This module takes the
socket out of asyncio's stream classes and reads and writes it directly: a payload is received into
the buffer that the caller gets, an 8 MiB one is sent without being copied, `send` returns when the
kernel has everything (so backpressure reaches the caller), and frames that arrived before a broken
connection are still read.

The remote peer id comes from libp2p's handshake, never from a frame. Nothing here looks into a
payload, retries, or times a send; a header is checked before its payload is allocated, and memory
grows with what arrives, not with what is announced. A stream to the node itself is a socket pair
in this process, because libp2p does not dial itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from typing_extensions import override

from planetserve.clock import Clock
from planetserve.errors import (
    HopTimeout,
    LocalProtocolError,
    RemoteProtocolError,
    StreamClosed,
    UnsupportedError,
)
from planetserve.swarm.bandwidth import BandwidthMeter
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.libp2p.forks import keep_from_children
from planetserve.swarm.libp2p.sockets import SocketReader, writable
from planetserve.swarm.network import Buffer, FrameTap
from planetserve.types import PeerId
from planetserve.wire.frame import HEADER_BYTES, FrameHeader

MAX_LARGE_FRAMES_PER_PEER = 8
"""Frames over 64 KiB that are received from one peer at once; a peer's further ones wait."""
_MAX_MEASURED_PEERS = 64
_READ_BYTES = 256 * 1024
_LARGE_BYTES = 64 * 1024
_MAX_BUFFERS_PER_CALL = 64
_FRAMES_PER_TURN = 8
_LINGER_S = 1.0

T = TypeVar("T")


class StreamTable:
    """The open streams of a node, and what they share.

    Args:
        clock: source of monotonic time.
    """

    def __init__(self, clock: Clock):
        self.open: set[FrameStream] = set()
        self.taps: list[FrameTap] = []
        self.send_rates = PeerEwma(max_peers=_MAX_MEASURED_PEERS, clock=clock)
        """Bytes per second that peers took, where this node had to wait for them."""
        self._large_slots: WeakValueDictionary[PeerId, asyncio.Semaphore] = WeakValueDictionary()

    def tap(self, event: str, remote: PeerId, header: FrameHeader) -> None:
        """Tell every tap of a frame."""
        for tap in self.taps:
            tap(event, remote, header)

    def large_slots(self, remote: PeerId) -> asyncio.Semaphore:
        """What bounds the memory that one peer's half-received frames take."""
        slots = self._large_slots.get(remote)
        if slots is None:
            slots = self._large_slots[remote] = asyncio.Semaphore(MAX_LARGE_FRAMES_PER_PEER)
        return slots


class _LargeSlot:
    """A stream's hold of one of its peer's slots for large frames."""

    def __init__(self, slots: asyncio.Semaphore):
        self.is_held = False
        self._slots = slots
        self._request: asyncio.Future[Any] | None = None
        self._is_given_up = False

    async def take(self) -> None:
        """Wait for a slot.

        Raises:
            EOFError: `give_up` was called meanwhile.
        """
        if self._slots.locked():
            self._request = asyncio.ensure_future(self._slots.acquire())
            try:
                await self._request
            except asyncio.CancelledError:
                if self._is_given_up:
                    raise EOFError from None
                raise
            finally:
                self._request = None
        else:
            await self._slots.acquire()
        self.is_held = True

    def free(self) -> None:
        """Leave the slot, if it is held, to others."""
        if self.is_held:
            self.is_held = False
            self._slots.release()

    def give_up(self) -> None:
        """End the wait for a slot."""
        self._is_given_up = True
        if self._request is not None:
            self._request.cancel()


class FrameStream:
    """One bidirectional stream of frames with one authenticated remote peer.

    Any number of tasks may send; one may receive at a time. `peek` and `receive` may be cancelled
    or time out and be called again without losing a byte. After a `send` that failed or was
    cancelled half-way nothing more can be sent, since the peer could not tell where the next frame
    starts; what the peer had sent can still be received.
    """

    def __init__(self, table: StreamTable, sock: socket.socket, remote: PeerId, head: bytes = b""):
        sock.setblocking(False)
        self.remote = remote
        self._table = table
        self._socket = sock
        keep_from_children(sock)
        self._send_lock = asyncio.Lock()
        self._ahead = bytearray(head)
        self._header: FrameHeader | None = None
        self._payload = bytearray()
        self._large_slot = _LargeSlot(table.large_slots(remote))
        self._num_active = 0
        self._num_unwaited = 0
        self._reader = SocketReader(sock)
        self._receiving = False
        self._can_send = True
        self._closed = False
        self._drain = BandwidthMeter()
        table.open.add(self)

    @property
    def bytes_received(self) -> int:
        """Bytes read so far, those of a frame that is still under way included."""
        return self._reader.num_bytes

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent: closed here, or broken."""
        return self._closed or not self._can_send

    async def send(self, header: FrameHeader, payload: Buffer | Sequence[Buffer] = b"") -> None:
        """Send one frame; return when the kernel has taken all of it.

        Args:
            header: its `payload_bytes` is filled in here.
            payload: one buffer or several that are sent one after the other. They may be changed
                again once this returns.

        Raises:
            StreamClosed: either end has closed the stream.
            LocalProtocolError: the payload is over its cap or a header field is out of range.
        """
        if isinstance(payload, bytes | bytearray | memoryview):
            payload = (payload,)
        views = [memoryview(b"")]
        num_bytes = 0
        for part in payload:
            view = memoryview(part)
            if view.nbytes:
                num_bytes += view.nbytes
                views.append(view.cast("B"))
        if header.payload_bytes != num_bytes:
            header = header.numbered(header.sequence, num_bytes)
        views[0] = memoryview(header.pack())
        async with self._send_lock:
            await self._send_views(views)
        self._table.tap("sent", self.remote, header)

    async def _send_views(self, views: list[memoryview]) -> None:
        if self.closed:
            raise StreamClosed(f"the stream to {short(self.remote)} is closed")
        first, offset = 0, 0
        self._num_active += 1
        self._drain.begin(asyncio.get_running_loop().time())
        try:
            while first < len(views):
                batch = [views[first][offset:], *views[first + 1 : first + _MAX_BUFFERS_PER_CALL]]
                try:
                    count = self._socket.sendmsg(batch)
                except BlockingIOError:
                    await self._wait_writable()
                    continue
                self._drain.sent(count)
                offset += count
                while first < len(views) and offset >= views[first].nbytes:
                    offset -= views[first].nbytes
                    first += 1
        except OSError as error:
            self._stop_sending()
            raise StreamClosed(f"the stream to {short(self.remote)} broke in sending") from error
        finally:
            if 0 < first < len(views) or offset:
                self._stop_sending()  # cancelled inside the frame
            self._drain.end(asyncio.get_running_loop().time())
            self._release()

    async def _wait_writable(self) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await writable(self._socket)
        rate = self._drain.waited(began_s, loop.time())
        if rate is not None:
            self._table.send_rates.add(self.remote, rate)

    async def peek(self, timeout_s: float | None = None) -> FrameHeader:
        """The header of the next frame, which `receive` returns with its payload.

        What follows the header stays where it is, so the caller can make room before it is read.
        Raises as `receive` does.
        """
        return await self._reading(self._receive_header(), timeout_s)

    async def receive(self, timeout_s: float | None = None) -> tuple[FrameHeader, bytearray]:
        """The next frame. The payload is the caller's to keep.

        Raises:
            StreamClosed: the stream ended, or was closed here.
            HopTimeout: no whole frame within `timeout_s`; calling again goes on where it stopped.
            UnsupportedError: a frame of another version; only `send` and `close` make sense now.
            RemoteProtocolError: a bad header; the stream is closed.
            LocalProtocolError: another task is receiving.
        """
        known, is_free = self._header, not (self._closed or self._receiving)
        if known is not None and len(self._payload) == known.payload_bytes and is_free:
            header, payload = known, self._take_payload()  # nothing to wait for
        else:
            header, payload = await self._reading(self._receive_frame(), timeout_s)
        self._table.tap("received", self.remote, header)
        return header, payload

    async def _reading(self, work: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        """Await `work`, the only reader of this stream, and turn what it raises into our errors."""
        if self._closed or self._receiving:
            work.close()
            if self._closed:
                raise StreamClosed(f"the stream from {short(self.remote)} is closed")
            raise LocalProtocolError("another task is receiving from this stream")
        self._receiving = True
        self._num_active += 1
        try:
            if timeout_s is None:
                return await work
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise HopTimeout(f"no frame from {short(self.remote)} in {timeout_s:g} s") from None
        except (OSError, EOFError) as error:
            self.abort()
            raise StreamClosed(f"{short(self.remote)} closed the stream") from error
        except UnsupportedError:
            raise  # the peer may be told; whoever serves the stream closes it
        except RemoteProtocolError:
            self.abort()
            raise
        finally:
            self._receiving = False
            self._release()

    async def _receive_header(self) -> FrameHeader:
        if self._header is not None:
            return self._header
        if len(self._ahead) < HEADER_BYTES:
            self._num_unwaited = 0
        elif self._num_unwaited >= _FRAMES_PER_TURN:
            # One read can bring hundreds of small frames; others' come in between.
            self._num_unwaited = 0
            await asyncio.sleep(0)
        self._num_unwaited += 1
        while len(self._ahead) < HEADER_BYTES:
            await self._reader.read_into(self._ahead, _LARGE_BYTES)
        header = FrameHeader.unpack(memoryview(self._ahead)[:HEADER_BYTES])
        end = HEADER_BYTES + header.payload_bytes
        self._payload = self._ahead[HEADER_BYTES:end]
        del self._ahead[:end]
        self._header = header
        return header

    async def _receive_frame(self) -> tuple[FrameHeader, bytearray]:
        header = await self._receive_header()
        if header.payload_bytes > _LARGE_BYTES and not self._large_slot.is_held:
            await self._large_slot.take()
        while len(self._payload) < header.payload_bytes:
            missing = header.payload_bytes - len(self._payload)
            await self._reader.read_into(self._payload, min(missing, _READ_BYTES))
        return header, self._take_payload()

    def _take_payload(self) -> bytearray:
        payload, self._payload, self._header = self._payload, bytearray(), None
        self._large_slot.free()
        return payload

    async def close(self) -> None:
        """Close this end; frames already sent still arrive. Idempotent, never raises."""
        if self._closed:
            return
        self._closed = True
        try:
            # Closing a socket with unread input resets the stream, which may overtake what was
            # just sent (the frame that says why). So: say "no more", read on a moment, then close.
            if not self._receiving and not self._send_lock.locked():
                await self._linger()
        finally:
            self.abort()

    async def _linger(self) -> None:
        self._stop_sending()
        self._num_active += 1
        try:
            async with asyncio.timeout(_LINGER_S):
                while True:
                    await self._reader.read_into(bytearray(), _READ_BYTES)
        except (OSError, EOFError):
            pass
        finally:
            self._num_active -= 1

    def _stop_sending(self) -> None:
        self._can_send = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Close this end now, whatever is still on its way, and wake the tasks that wait on it."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._large_slot.give_up()
        self._num_active += 1
        self._release()

    def _release(self) -> None:
        # The loop may still watch the descriptor while another task waits on it.
        self._num_active -= 1
        if self._closed and not self._num_active:
            self._large_slot.free()
            self._reader.unwatch()
            self._socket.close()
            self._table.open.discard(self)

    @override
    def __repr__(self) -> str:
        return f"FrameStream({short(self.remote)}, {'closed' if self.closed else 'open'})"


def short(peer_id: PeerId) -> str:
    """The end of a peer id, for logs and messages."""
    return f"…{peer_id[-6:]}"
