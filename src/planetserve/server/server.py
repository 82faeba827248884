"""A server from its settings to its last byte: join, load, measure, serve, drain, leave.

Composition root of the server role; the only place that knows all its parts. `Server.start`
returns once the server can serve; `close` drains and leaves nothing running. Use as
`async with await Server.start(config) as server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

import planetserve
from planetserve.clock import Clock, SystemClock
from planetserve.config import ServerConfig
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.errors import (
    PlanetServeError,
    TransportError,
)
from planetserve.model.checkpoint import Checkpoint, parse_dtype
from planetserve.model.linear_backends import BACKENDS as LINEAR_BACKENDS
from planetserve.model.malloc_tuning import share_one_arena
from planetserve.model.manifest import OwnWeights
from planetserve.model.quantization import BYTES_PER_WEIGHT, require_quantizer
from planetserve.model.span_blocks import SpanBlocks
from planetserve.server.announcer import Announcer
from planetserve.server.factory import (
    build_engine,
    check_span,
    device_named,
    engine_config_of,
    node_config,
    open_checkpoint,
    with_quant_type,
)
from planetserve.server.handler import ServedModel, SessionHandler, capabilities
from planetserve.server.limits import ServerLimits
from planetserve.server.metrics import MetricsEndpoint, ServerCollector
from planetserve.server.neighbours import Neighbours
from planetserve.server.reachability import warn_if_unreachable
from planetserve.server.receipts import ReceiptSigner
from planetserve.server.span_choice import ahead_of, choose_span, is_wanted_elsewhere
from planetserve.swarm.directory import Directory
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.swarm.network import Join, Network
from planetserve.swarm.ping import serve_ping
from planetserve.tensors import dtype_name
from planetserve.types import BlockSpan, ServerInfo, ServerState
from planetserve.wire import protocols

logger = logging.getLogger(__name__)

DEFAULT_NETWORK_BYTES_PER_S = 12_500_000.0
"""Announced until large pushes have shown this server's rate: 100 Mbit/s."""
_BYTES_PER_S_PER_MBPS = 125_000.0
DRAIN_TIMEOUT_S = 30.0
_SETTLE_S = 2.0
"""Until others that start at the same time have announced what they take."""
_MANIFEST_WAIT_S = 1.0
"""Until the server is announced without the manifest of its weights."""
_MAX_CHOICES = 8
_UNMEASURED_MS = 1000.0
"""Announced per block while the span is still loading: nobody should plan on it."""


class Server:
    """A running server. Made by `start`."""

    def __init__(
        self,
        config: ServerConfig,
        checkpoint: Checkpoint,
        node: Network,
        clock: Clock,
        rng: random.Random | None = None,
    ):
        self.config = config
        self.checkpoint = checkpoint
        self.node = node
        self.engine: Engine
        self.handler: SessionHandler
        self.span: BlockSpan
        self.state = ServerState.JOINING
        self.weights = OwnWeights(checkpoint.fingerprint, checkpoint.manifest)
        self._clock = clock
        self._prefix = config.dht_prefix or checkpoint.model_prefix
        self._dtype: torch.dtype
        self._max_session_tokens = 0
        self._directory = Directory(node, clock)
        self._neighbours = Neighbours(node, self._directory, self._clock, rng)
        self._announcer = Announcer(
            self._directory,
            self.info,
            self._before_announcing,
            config.update_period,
            config.expiration_s,
        )
        self._releasing: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, config: ServerConfig, clock: Clock | None = None, join: Join = SwarmNode.start
    ) -> Server:
        """Join the swarm, choose and load the span, and begin to serve.

        Raises:
            ConfigError: a setting does not fit the model or the machine.
            PeerUnreachable: no initial peer answers.
        """
        started_s = time.monotonic()
        checkpoint = await asyncio.to_thread(open_checkpoint, config)
        device = device_named(config.device)
        dtype = parse_dtype(config.torch_dtype, checkpoint, device)
        check_span(config, checkpoint)
        LINEAR_BACKENDS.check(config.linear_backend)
        node = await join(node_config(config))
        server = cls(config, checkpoint, node, clock or SystemClock())
        await server.begin(dtype, device)
        logger.info("ready after %.1f s", time.monotonic() - started_s)
        return server

    async def begin(self, dtype: torch.dtype, device: torch.device) -> None:
        """Choose and load the span, and begin to serve; leaves nothing behind if that fails."""
        try:
            self._dtype = dtype
            self.config = with_quant_type(self.config, self.checkpoint, device)
            await self.weights.recall()
            others = await self._choose_span()
            await self._build(device)
            if await self._is_wanted_elsewhere():
                self.engine.close()
                await self._build(device)
            await self._open_doors()
            self._warn_of_other_revisions(others)
        except BaseException:
            await self._abandon()
            raise

    def info(self) -> ServerInfo:
        """What this server announces now."""
        stats = self.engine.stats() if hasattr(self, "engine") else None
        decode_ms = (stats and stats.decode_ms_per_block) or _UNMEASURED_MS
        # Without a large batch so far, one token at a time is what is known.
        tokens_per_s = (stats and stats.tokens_per_s_per_block) or 1000.0 / decode_ms
        if self.config.throughput != "auto":
            tokens_per_s = float(self.config.throughput)
        return ServerInfo(
            peer_id=self.node.peer_id,
            model=self._prefix,
            fingerprint=self.weights.fingerprint,
            span=self.span,
            num_blocks=self.checkpoint.num_blocks,
            state=self.state,
            dtype=dtype_name(self._dtype),
            quant_type=self.config.quant_type,
            addresses=self.node.addresses(),
            decode_ms_per_block=decode_ms,
            alone_ms_per_block=stats.alone_ms_per_block if stats else 0.0,
            tokens_per_s_per_block=tokens_per_s,
            network_bytes_per_s=self._network_bytes_per_s(),
            hop_overhead_ms=stats.overhead_ms if stats else 0.0,
            next_rtt_ms=self._neighbours.rtt_ms,
            free_cache_tokens=stats.free_cache_tokens if stats else 0,
            max_session_tokens=self._max_session_tokens or 1,
            version=planetserve.__version__,
            public_name=self.config.public_name,
            announced_at_s=self._clock.unix(),
            protocol_versions=(protocols.OLDEST_VERSION, protocols.PROTOCOL_VERSION),
            capabilities=tuple(sorted(capabilities(gives_receipts=self.config.receipts))),
            manifest=self.weights.manifest,
        )

    def collector(self) -> ServerCollector:
        """What Prometheus reads."""
        return ServerCollector(
            self.checkpoint.name, self.engine, self.info, lambda: self.handler.counters
        )

    def _network_bytes_per_s(self) -> float:
        if self.config.network_mbps is not None:
            return self.config.network_mbps * _BYTES_PER_S_PER_MBPS
        # A slow peer says nothing of this server's link: that carries what the best one took.
        return max(self.node.send_rates.snapshot().values(), default=DEFAULT_NETWORK_BYTES_PER_S)

    async def _before_announcing(self) -> None:
        """Once a period: measure what takes a while, and tell the operator how things are."""
        await self._neighbours.measure(self._prefix, self.weights, self.span)
        stats = self.engine.stats()
        if stats.num_sessions:
            logger.info(
                "%d sessions; %d of %d KV pages in use, %.1f %% of their slots hold tokens",
                stats.num_sessions, stats.pages_used, stats.pages_total,
                100 * stats.kv_useful_share,
            )  # fmt: skip
        if stats.preemptions:
            logger.info(
                "%d sessions wait for KV pages; since the start pages were taken %d times and %d "
                "tokens recomputed (--kv_overcommit)",
                stats.sessions_waiting, stats.preemptions, stats.recomputed_tokens,
            )  # fmt: skip

    async def close(self, drain_timeout_s: float = 0.0) -> None:
        """Stop admitting, wait for open sessions, announce leaving, release everything.

        Cancelled while it waits, it has released nothing; the next call does.
        """
        if self._releasing is None:
            await self._drain(drain_timeout_s)
        if self._releasing is None:
            self._releasing = asyncio.create_task(self._release())
        await asyncio.shield(self._releasing)

    async def _drain(self, timeout_s: float) -> None:
        self.state = ServerState.DRAINING
        if self.handler.num_sessions and timeout_s > 0:
            logger.info(
                "draining: waits up to %g s for %d sessions to move or end; interrupt again to "
                "leave at once", timeout_s, self.handler.num_sessions,
            )  # fmt: skip
            with contextlib.suppress(PlanetServeError):  # who is cut off has sessions all the same
                await self._announcer.announce()
        await self.handler.drain(timeout_s)

    async def _release(self) -> None:
        self.state = ServerState.OFFLINE
        await self._announcer.close()
        await self.node.close()
        self.engine.close()
        logger.info("left the swarm")

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _others(self) -> list[ServerInfo]:
        """Other servers of this model that are there or about to be, whatever files they have."""
        return [
            info
            for info in await self._directory.lookup(self._prefix)
            if info.peer_id != self.node.peer_id and info.state in _PRESENT
        ]

    def _same_files(self, others: Sequence[ServerInfo]) -> list[ServerInfo]:
        num_blocks = self.checkpoint.num_blocks
        return [
            info
            for info in others
            if self.weights.are_those_of(info) and info.num_blocks == num_blocks
        ]

    async def _choose_span(self) -> Sequence[ServerInfo]:
        """Take the blocks that were asked for; with `num_blocks`, those that nobody who starts at
        the same time takes. Returns the servers that were there before."""
        others = await self._others()
        if self.config.block_indices is not None:
            self.span = self.config.block_indices
            return others
        self.span = self._best_span(self._same_files(others))
        for _ in range(_MAX_CHOICES if self.config.initial_peers else 0):
            await self._announcer.announce()
            await asyncio.sleep(_SETTLE_S)
            ours = self._same_files(await self._others())
            if self._best_span(ahead_of(self.node.peer_id, ours)) == self.span:
                break
            self.span = self._best_span(ours)
        return others

    def _best_span(self, others: Sequence[ServerInfo]) -> BlockSpan:
        return choose_span(others, self.checkpoint.num_blocks, self.config.num_blocks or 1)

    async def _is_wanted_elsewhere(self) -> bool:
        """Whether it is better to load other blocks before anybody uses these."""
        if self.config.block_indices is not None:
            return False
        with contextlib.suppress(PlanetServeError):  # it serves what it has
            ours = self._same_files(await self._others())
            wanted = is_wanted_elsewhere(
                self.node.peer_id, self.span, ours, self.checkpoint.num_blocks
            )
            if wanted:
                taken, self.span = self.span, self._best_span(ours)
                logger.warning(
                    "others serve blocks %s by now, and nobody %s: loads these instead",
                    taken, self.span,
                )  # fmt: skip
            return wanted
        return False

    def _warn_of_other_revisions(self, others: Sequence[ServerInfo]) -> None:
        """Not an error: anybody may announce anything, and clients go by their own files."""
        ours = self._same_files(others)
        strangers = [info for info in others if info not in ours]
        if not strangers:
            return
        theirs = sorted({info.fingerprint[:12] for info in strangers})
        more = f" and {len(theirs) - 3} more" if len(theirs) > 3 else ""
        logger.warning(
            "%d of the servers announced as %s have other files than this one (%s%s; here %s) and "
            "serve none of its clients; if that is not meant, serve the same files and --revision, "
            "or give servers and clients of yours a --dht_prefix",
            len(strangers), self._prefix, ", ".join(theirs[:3]), more,
            self.weights.fingerprint[:12],
        )  # fmt: skip

    async def _build(self, device: torch.device) -> None:
        """Load the span and measure it, with a JOINING record so that others plan around it."""
        config = self.config
        engine_config = engine_config_of(config, self.checkpoint)
        self._max_session_tokens = engine_config.inference_max_length
        if self.config.quant_type in BYTES_PER_WEIGHT:
            require_quantizer(self.config.quant_type)
        await self._announcer.announce()
        logger.info("loading blocks %s of %s", self.span, self.checkpoint.name)
        self.engine = await self._load_engine(engine_config, device)
        self._max_session_tokens = self.engine.max_length

    async def _load_engine(self, config: EngineConfig, device: torch.device) -> Engine:
        return await asyncio.to_thread(
            build_engine,
            lambda: SpanBlocks.load(
                self.checkpoint, self.span, self._dtype, device, quant_type=self.config.quant_type
            ),
            self.config.linear_backend,
            config,
        )

    async def _open_doors(self) -> None:
        model = ServedModel(
            self._prefix, self.weights.fingerprint, self.span, self._max_session_tokens
        )
        limits = ServerLimits(
            max_sessions=self.config.max_sessions,
            max_peer_sessions=self.config.max_peer_sessions,
            max_peer_opens=self.config.max_peer_opens,
            peer_open_burst=self.config.peer_open_burst,
            max_queued_bytes=self.config.max_queued_mib << 20,
            max_peer_queued_bytes=self.config.max_peer_queued_mib << 20,
            session_timeout_s=self.config.session_timeout,
            step_timeout_s=self.config.step_timeout,
            max_chunk_tokens=self.config.max_batch_size,
        )
        signer = None
        if self.config.receipts:
            signer = ReceiptSigner(
                self.node.identity, self.weights, self.config.quant_type, self._clock
            )
        self.handler = SessionHandler(self.node, self.engine, model, limits, self._clock, signer)
        await serve_ping(self.node)
        await self.handler.start()
        self.node.spawn(self._learn_manifest(), "hashing of the weights")
        await self.weights.wait_settled(_MANIFEST_WAIT_S)
        self.state = ServerState.ONLINE
        await self._announcer.announce()
        self._announcer.start()
        self.node.spawn(
            warn_if_unreachable(node_config(self.config).announced),
            "check of the announced addresses",
        )

    async def _learn_manifest(self) -> None:
        """Announce what the weights are. The span was hashed while it was loaded; what is left may
        take long, and is read once: the hashes stay on disk."""
        await self.weights.learn()
        if self.weights.manifest and self.state is ServerState.ONLINE:
            with contextlib.suppress(PlanetServeError):  # the next announcement has it
                await self._announcer.announce()

    async def _abandon(self) -> None:
        """Undo a start that failed half-way."""
        if hasattr(self, "span"):
            self.state = ServerState.OFFLINE
            await self._announcer.close()
        await self.node.close()
        if hasattr(self, "engine"):
            self.engine.close()


async def serve(
    config: ServerConfig, stop: asyncio.Event, on_ready: Callable[[Server], None]
) -> None:
    """Serve until `stop` is set, then drain. `on_ready` is called once the server can serve.

    Raises:
        ConfigError: the port for metrics is taken, or as `Server.start`.
        TransportError: the libp2p daemon ended, so nobody reaches this server any more.
    """
    async with contextlib.AsyncExitStack() as stack:
        if config.metrics_port is not None:
            endpoint = MetricsEndpoint()
            await stack.enter_async_context(endpoint.answering(config.metrics_port))

        def ready(server: Server) -> None:
            if config.metrics_port is not None:
                endpoint.show(server.collector())
            on_ready(server)

        await _serve(config, stop, ready)


async def _serve(
    config: ServerConfig, stop: asyncio.Event, on_ready: Callable[[Server], None]
) -> None:
    """As `serve`, without metrics.

    Raises:
        TransportError: the libp2p daemon ended, so nobody reaches this server any more.
    """
    share_one_arena()
    starting = asyncio.create_task(Server.start(config))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            logger.info("stopped before it was ready to serve")
            return
        server = starting.result()
        try:
            on_ready(server)
            cut_off = asyncio.create_task(server.node.stopped.wait())
            await asyncio.wait([cut_off, stopping], return_when=asyncio.FIRST_COMPLETED)
            if cut_off.done():
                raise TransportError("the libp2p daemon ended; this server is off the network")
            cut_off.cancel()
            await server.close(DRAIN_TIMEOUT_S)
        finally:
            await server.close()
    finally:
        stopping.cancel()


_PRESENT = (ServerState.JOINING, ServerState.ONLINE)
