"""One session on one chain: opens every hop, sends to the first, takes answers from the last.

Frames go client -> hop 1 -> ... -> hop n -> client; the streams to the hops in between carry only
their OPEN, ERROR and CLOSE. A ring lives until its first failure: it never repairs itself, it says
which peer failed, and `InferenceSession` builds another. Runs on the portal's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from planetserve.crypto.channel import EdgeOpener, EdgeSealer, Opener, Sealer
from planetserve.crypto.handshake import ClientHandshake
from planetserve.crypto.secrets import ChannelSecret, new_edge_secret, seal_deal, wipe
from planetserve.errors import (
    HopTimeout,
    PlanetServeError,
    RemoteProtocolError,
    StreamClosed,
    error_from_code,
)
from planetserve.swarm.node import SwarmNode
from planetserve.swarm.ping import ping
from planetserve.swarm.streams import FrameStream, open_stream
from planetserve.tensors import dtype_name, tensor_bytes, tensor_from_payload, wire_dtype
from planetserve.types import CLIENT, Chain, PeerId, ServerInfo
from planetserve.wire.frame import (
    FLAG_KEEP_LAST,
    HEADER_BYTES,
    MAX_STEP_BYTES,
    Direction,
    FrameHeader,
    FrameType,
)
from planetserve.wire.messages import (
    ErrorReply,
    NextHop,
    OpenSession,
    SessionOpened,
    decode,
    from_text,
    to_text,
)
from planetserve.wire.protocols import SESSION_PROTOCOL
from planetserve.wire.step import StepTable

T = TypeVar("T")

_TABLE_ROOM_BYTES = 64 * 1024
_POSITION_BYTES = 4
_SMALL_FRAME_BYTES = 64 * 1024
"""The daemon takes a frame below this at once, so sending it needs no watch."""
_LAST_WORDS_TIMEOUT_S = 0.2


@dataclass(frozen=True, slots=True)
class RingSpec:
    """What a session needs of its chain."""

    num_rows: int
    max_length: int
    """Tokens per row to lease at every hop; a session may grow past it while pages are free."""
    hidden_size: int
    dtype: torch.dtype
    connect_timeout_s: float
    step_timeout_s: float
    probe_after_s: float
    """Silence after which the hops are pinged: a dead one costs seconds, not the timeout."""
    ping_timeout_s: float


class RingSession:
    """An open session on `chain`. Made by `open`; one step at a time."""

    sealer_type: ClassVar[Callable[..., Sealer]] = EdgeSealer
    opener_type: ClassVar[Callable[..., Opener]] = EdgeOpener

    def __init__(self, chain: Chain, spec: RingSpec):
        self.chain = chain
        self.session_id = os.urandom(16)
        self._spec = spec
        self._streams: list[FrameStream] = []
        self._readers: list[asyncio.Task[None]] = []
        self._inbox: asyncio.Queue[tuple[FrameHeader, bytearray] | PlanetServeError] = (
            asyncio.Queue()
        )
        self._sealer: Sealer
        self._opener: Opener
        self._step = 0
        self._max_chunk_tokens = 1
        self._pinger: Callable[[PeerId], Awaitable[bool]]
        self.leaving: set[PeerId] = set()
        """Hops that have said they will leave soon; the session should move between two steps."""

    @classmethod
    async def open(
        cls,
        node: SwarmNode,
        chain: Chain,
        servers: Mapping[PeerId, ServerInfo],
        spec: RingSpec,
    ) -> RingSession:
        """Open `chain`'s hops concurrently.

        Raises:
            PlanetServeError: a hop refused or cannot be reached; `peer_id` names it.
        """
        ring = cls(chain, spec)

        async def answers(peer_id: PeerId) -> bool:
            addresses = servers[peer_id].addresses
            with contextlib.suppress(PlanetServeError):
                await ping(node, peer_id, addresses, timeout_s=spec.ping_timeout_s)
                return True
            return False

        ring._pinger = answers
        try:
            await ring._open_hops(node, servers)
        except BaseException:
            await ring.close()
            raise
        return ring

    async def step(
        self, table: StepTable, hidden_TD: torch.Tensor, *, keep_last: bool = False
    ) -> torch.Tensor:
        """Send one step around the ring and return its `[num_tokens, hidden]` outputs.

        Chunks of a long step follow one another through the hops like a pipeline. With
        `keep_last`, only the outputs of each row's last token come back; the others are zeros.

        Raises:
            PlanetServeError: the step failed; the ring must be closed.
        """
        tables = table.split(self._max_chunk_tokens)
        caller_dtype = hidden_TD.dtype
        hidden_TD = hidden_TD.to(self._spec.dtype)
        output_TD = torch.zeros_like(hidden_TD) if keep_last else torch.empty_like(hidden_TD)
        # The readers drain the last hop meanwhile, so sending everything first cannot deadlock.
        await self._send_chunks(tables, hidden_TD, keep_last)
        offset = 0
        for chunk, piece in enumerate(tables):
            header, payload = await self._next_frame()
            chunk_TD = self._check_output(header, payload, piece, chunk, keep_last)
            if keep_last:
                output_TD[[offset + end for end in piece.last_tokens()]] = chunk_TD
            else:
                output_TD[offset : offset + piece.num_tokens] = chunk_TD
            offset += piece.num_tokens
        self._step += 1
        return output_TD.to(caller_dtype)

    async def close(self) -> None:
        """Tell every hop that the session is over and release the streams. Never raises."""
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await asyncio.gather(*(self._close_hop(stream) for stream in self._streams))
        if hasattr(self, "_sealer"):
            self._sealer.erase()
            self._opener.erase()
        self._readers, self._streams = [], []

    async def _close_hop(self, stream: FrameStream) -> None:
        with contextlib.suppress(PlanetServeError, asyncio.TimeoutError):
            header = FrameHeader(FrameType.CLOSE, session=self.session_id)
            await asyncio.wait_for(stream.send(header), timeout=1.0)
        await stream.close()

    async def _open_hops(self, node: SwarmNode, servers: Mapping[PeerId, ServerInfo]) -> None:
        opening = [
            asyncio.create_task(self._open_hop(node, servers, index))
            for index in range(len(self.chain))
        ]
        try:
            await asyncio.wait(opening)
        finally:
            for task in opening:
                task.cancel()
            results = await asyncio.gather(*opening, return_exceptions=True)
            opened = [item for item in results if not isinstance(item, BaseException)]
            self._streams = [item[0] for item in opened]
        for item in results:
            if isinstance(item, BaseException):
                raise item
        token_bytes = self._spec.hidden_size * self._spec.dtype.itemsize + _POSITION_BYTES
        by_bytes = (MAX_STEP_BYTES - _TABLE_ROOM_BYTES - HEADER_BYTES) // token_bytes
        by_hops = min(item[1].max_chunk_tokens for item in opened)
        self._max_chunk_tokens = max(1, min(by_bytes, by_hops))
        await self._deal([item[2] for item in opened])
        self._readers = [
            asyncio.create_task(self._read(index, stream))
            for index, stream in enumerate(self._streams)
        ]

    async def _open_hop(
        self, node: SwarmNode, servers: Mapping[PeerId, ServerInfo], index: int
    ) -> tuple[FrameStream, SessionOpened, ChannelSecret]:
        hops = self.chain.hops
        hop, info = hops[index], servers[hops[index].peer_id]
        following = None
        if index + 1 < len(hops):
            after = hops[index + 1]
            following = NextHop(
                peer_id=after.peer_id,
                end=after.end,
                addresses=list(servers[after.peer_id].addresses),
            )
        handshake = ClientHandshake(self.session_id, index, hop.peer_id)
        message = OpenSession(
            model=info.model,
            fingerprint=info.fingerprint,
            dtype=dtype_name(self._spec.dtype),  # type: ignore[arg-type]
            start=hop.start,
            end=hop.end,
            num_rows=self._spec.num_rows,
            max_length=self._spec.max_length,
            edge=index,
            epoch=0,
            previous=hops[index - 1].peer_id if index else CLIENT,
            next=following,
            offer=to_text(handshake.offer),
        ).encode()
        timeout_s = self._spec.connect_timeout_s
        try:
            stream = await open_stream(
                node, hop.peer_id, info.addresses, SESSION_PROTOCOL, timeout_s
            )
            try:
                header = FrameHeader(FrameType.OPEN, session=self.session_id, edge=index)
                await stream.send(header, message)
                answer, payload = await stream.receive(timeout_s)
                if answer.type is FrameType.ERROR:
                    raise _remote_error(payload, hop.peer_id, set())
                if answer.type is not FrameType.OPENED:
                    raise RemoteProtocolError(f"expected OPENED, got {answer.type.name}")
                opened = decode(SessionOpened, payload)
                answer_key, signature = from_text(opened.answer), from_text(opened.signature)
                return stream, opened, handshake.finish(message, answer_key, signature)
            except BaseException:
                await stream.close()
                raise
        except PlanetServeError as error:
            error.peer_id = error.peer_id or hop.peer_id
            raise

    async def _deal(self, channels: Sequence[ChannelSecret]) -> None:
        """Give every hop the secrets of its two edges, and keep those of the ring's ends."""
        secrets = [new_edge_secret() for _ in range(len(channels) + 1)]
        edge, now_s = len(channels), time.monotonic()
        forward = Direction.FORWARD
        self._sealer = self.sealer_type(secrets[0], self.session_id, 0, 0, forward, now_s)
        self._opener = self.opener_type(secrets[-1], self.session_id, edge, 0, forward)
        try:
            for index, channel in enumerate(channels):
                blob = seal_deal(channel, 0, secrets[index], secrets[index + 1])
                channel.erase()
                header = FrameHeader(FrameType.DEAL, session=self.session_id, edge=index)
                await self._streams[index].send(header, blob)
        finally:
            wipe(*secrets)

    async def _read(self, index: int, stream: FrameStream) -> None:
        hops = self.chain.hops
        peer_id = hops[index].peer_id
        is_last = index == len(hops) - 1
        # A hop may blame those it exchanges frames with, and nobody else.
        neighbours = {hop.peer_id for hop in hops[max(0, index - 1) : index + 2]}
        try:
            while True:
                header, payload = await stream.receive()
                if header.type is FrameType.ERROR:
                    raise _remote_error(payload, peer_id, neighbours)
                if header.type is FrameType.LEAVING:
                    self.leaving.add(peer_id)
                    continue
                if header.type is not FrameType.STEP or not is_last:
                    raise RemoteProtocolError(f"{header.type.name} frame from hop {index}")
                self._inbox.put_nowait((header, payload))
        except PlanetServeError as error:
            error.peer_id = error.peer_id or peer_id
            self._inbox.put_nowait(error)
            # Whoever is blocked in sending to the first hop must learn of it now.
            await self._streams[0].close()

    async def _next_frame(self) -> tuple[FrameHeader, bytearray]:
        try:
            # Nearly every answer comes in time; only a late one is worth a task and a watch.
            async with asyncio.timeout(self._spec.probe_after_s):
                item = await self._inbox.get()
        except TimeoutError:
            item = await self._watched(self._inbox.get(), self._spec.probe_after_s)
        if isinstance(item, PlanetServeError):
            raise item
        return item

    async def _watched(self, work: Coroutine[Any, Any, T], waited_s: float = 0.0) -> T:
        """Wait for `work`, pinging the hops whenever nothing has happened for a while.

        Args:
            work: what to wait for.
            waited_s: how long it has been waited for already.

        Raises:
            HopTimeout: a hop is silent to two pings in a row (`peer_id` names it), or the step
                timeout is over although all hops answer.
        """
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._spec.step_timeout_s - waited_s
        try:
            if not waited_s:
                await asyncio.wait([task], timeout=self._spec.probe_after_s)
            while not task.done():
                if loop.time() >= deadline_s:
                    raise HopTimeout(
                        f"no answer from the chain within {self._spec.step_timeout_s:g} s"
                    )
                await self._probe_until(task)
                pause_s = min(self._spec.probe_after_s, max(0.0, deadline_s - loop.time()))
                await asyncio.wait([task], timeout=pause_s)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _probe_until(self, task: asyncio.Future[T]) -> None:
        """Ping the hops once; raise if one is silent and `task` has not finished meanwhile."""
        probe = asyncio.ensure_future(self._silent_hop())
        either: tuple[asyncio.Future[Any], ...] = (task, probe)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            silent = probe.result() if probe.done() else None
        finally:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
        if silent is not None and not task.done():
            error = HopTimeout("a server has stopped answering")
            error.peer_id = silent
            raise error

    async def _silent_hop(self) -> PeerId | None:
        """The first hop that answers neither of two pings."""
        suspects = list(dict.fromkeys(hop.peer_id for hop in self.chain.hops))
        for _ in range(2):
            alive = await asyncio.gather(*(self._pinger(peer) for peer in suspects))
            suspects = [peer for peer, answers in zip(suspects, alive, strict=True) if not answers]
        return suspects[0] if suspects else None

    async def _send_chunks(
        self, tables: tuple[StepTable, ...], hidden_TD: torch.Tensor, keep_last: bool
    ) -> None:
        first = self.chain.hops[0]
        offset = 0
        for chunk, table in enumerate(tables):
            count = table.num_tokens
            header = FrameHeader(
                FrameType.STEP,
                session=self.session_id,
                edge=0,
                step=self._step,
                position=table.rows[0].start,
                num_tokens=count,
                span_start=first.start,
                span_end=first.end,
                dtype=wire_dtype(self._spec.dtype),
                shape=(count, self._spec.hidden_size),
                chunk=chunk,
                num_chunks=len(tables),
                flags=FLAG_KEEP_LAST if keep_last else 0,
            )
            body = tensor_bytes(hidden_TD[offset : offset + count])
            header, sealed = self._sealer.seal(header, [table.pack(), body], time.monotonic())
            try:
                if len(sealed) < _SMALL_FRAME_BYTES:
                    await self._streams[0].send(header, sealed)
                else:
                    await self._watched(self._streams[0].send(header, sealed))
            except StreamClosed as error:
                error.peer_id = first.peer_id
                raise await self._why_closed(error) from error
            offset += count

    async def _why_closed(self, error: PlanetServeError) -> PlanetServeError:
        """What a hop said before the first stream closed, if its words arrive in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                while True:
                    item = await self._inbox.get()
                    if isinstance(item, PlanetServeError):
                        return item
        return error

    def _check_output(
        self,
        header: FrameHeader,
        payload: bytearray,
        table: StepTable,
        chunk: int,
        keep_last: bool,
    ) -> torch.Tensor:
        """The chunk's outputs, after everything the last hop said of them has been checked."""
        count = len(table.rows) if keep_last else table.num_tokens
        last = self.chain.hops[-1]
        shape = (count, self._spec.hidden_size)
        try:
            plaintext = self._opener.open(header, payload)
            if (header.step, header.chunk, header.shape) != (self._step, chunk, shape):
                raise RemoteProtocolError("the last hop answered another step than was asked")
            if header.dtype is not wire_dtype(self._spec.dtype):
                raise RemoteProtocolError("the last hop answered in another dtype")
            chunk_TD = tensor_from_payload(plaintext, 0, header.dtype, header.shape)
            if not bool(torch.isfinite(chunk_TD).all()):
                raise RemoteProtocolError("the last hop answered numbers that are not finite")
            return chunk_TD
        except PlanetServeError as error:
            error.peer_id = last.peer_id
            raise


def _remote_error(
    payload: bytearray, peer_id: PeerId, neighbours: Collection[PeerId]
) -> PlanetServeError:
    reply = decode(ErrorReply, payload)
    error = error_from_code(reply.code, reply.message, reply.retry_after_s)
    error.peer_id = reply.blamed_peer if reply.blamed_peer in neighbours else peer_id
    return error
