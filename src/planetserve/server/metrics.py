"""What Prometheus reads of a server at `--metrics_port`: vLLM's names for what means the same.

Everything is read from counters that exist anyway, when somebody asks; serving tokens costs
nothing. The endpoint runs on the server's own event loop, on loopback, and answers GET /metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planetserve.engine.batch_totals import BATCH_SIZES
from planetserve.engine.engine import Engine
from planetserve.errors import ConfigError
from planetserve.types import ServerInfo, ServerState

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_MAX_HEAD_BYTES = 8192
_TIMEOUT_S = 5.0
_LABELS = ("model_name", "engine")


@dataclass(frozen=True, slots=True)
class ServerCollector:
    """Reads one server, for a registry of prometheus-client.

    Attributes:
        model: value of the label `model_name`.
        engine: of the server.
        info: what it announces now.
        refusals: how often what was refused.
    """

    model: str
    engine: Engine
    info: Callable[[], ServerInfo]
    refusals: Callable[[], Mapping[str, int]]

    def collect(self) -> Iterable[Any]:
        """The metrics of this moment."""
        from prometheus_client import core

        stats, totals, info = self.engine.stats(), self.engine.batch_totals, self.info()
        gauges = {
            "vllm:num_requests_running": ("Open sessions.", stats.num_sessions),
            "vllm:num_requests_waiting": ("Sessions without pages.", stats.sessions_waiting),
            "vllm:kv_cache_usage_perc": (
                "Used share of the KV cache, 1 is all.", stats.pages_used / stats.pages_total,
            ),
            "planetserve:kv_pages_total": ("Pages of the KV cache.", stats.pages_total),
            "planetserve:kv_pages_used": ("Pages in use.", stats.pages_used),
            "planetserve:kv_pages_leased": ("Pages promised to sessions.", stats.pages_leased),
            "planetserve:kv_useful_share": (
                "Share of used pages' slots that hold a token.", stats.kv_useful_share,
            ),
            "planetserve:free_cache_tokens": ("What can be promised.", stats.free_cache_tokens),
            "planetserve:queued_tokens": ("Tokens that wait to run.", stats.queued_tokens),
            "planetserve:kept_input_bytes": ("Kept to recompute.", stats.kept_input_bytes),
            "planetserve:hop_block_seconds": (
                "One decode step in one block under load.", stats.decode_ms_per_block / 1000,
            ),
            "planetserve:hop_overhead_seconds": (
                "What a decode step costs besides.", stats.overhead_ms / 1000,
            ),
            "planetserve:block_tokens_per_second": (
                "Through one block in large batches.", stats.tokens_per_s_per_block,
            ),
            "planetserve:first_block": ("Serves from here.", info.span.start),
            "planetserve:num_blocks": ("So many blocks.", len(info.span)),
            "planetserve:online": ("1: takes sessions.", int(info.state is ServerState.ONLINE)),
        }  # fmt: skip
        counters = {
            "vllm:num_preemptions": ("Sessions that lost pages.", stats.preemptions),
            "vllm:prompt_tokens": ("Tokens of longer steps.", totals.prompt_tokens),
            "vllm:generation_tokens": ("One-token steps.", totals.decode_tokens),
            "planetserve:recomputed_tokens": ("Tokens run once more.", stats.recomputed_tokens),
            "planetserve:batches": ("Batches that have run.", sum(totals.by_size)),
            "planetserve:batch_seconds": ("Time in batches.", totals.busy_s),
        }
        own = (self.model, "0")
        for name, (text, value) in gauges.items():
            gauge = core.GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(own, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = core.CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(own, value)
            yield counter
        sizes = core.HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens in a batch.", labels=_LABELS
        )
        num_tokens = totals.decode_tokens + totals.prompt_tokens
        sizes.add_metric(own, _cumulative(totals.by_size), num_tokens)
        yield sizes
        refused = core.CounterMetricFamily(
            "planetserve:refusals", "What was refused.", labels=(*_LABELS, "reason")
        )
        for reason, count in self.refusals().items():
            refused.add_metric((*own, reason), count)
        yield refused
        links = core.GaugeMetricFamily(
            "planetserve:link_rtt_seconds", "To servers that may come next.",
            labels=(*_LABELS, "peer"),
        )  # fmt: skip
        for peer_id, rtt_ms in info.next_rtt_ms.items():
            links.add_metric((*own, peer_id), rtt_ms / 1000)
        yield links


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets: how many are at most as large."""
    total, found = 0, []
    for bound, count in zip([*map(str, map(float, BATCH_SIZES)), "+Inf"], counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found


class MetricsEndpoint:
    """Answers GET /metrics on a loopback port. Nothing is there until `show`.

    Raises:
        ConfigError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError:
            raise ConfigError(
                "--metrics_port needs prometheus-client: pip install 'planetserve[metrics]'"
            ) from None
        self._registry = CollectorRegistry()
        self.port = 0

    @contextlib.asynccontextmanager
    async def answering(self, port: int) -> AsyncIterator[None]:
        """Listen on `port` in this block; 0 takes a free one.

        Raises:
            ConfigError: the port is taken.
        """
        try:
            server = await asyncio.start_server(
                self._answer, _HOST, port, limit=_MAX_HEAD_BYTES, backlog=16
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {_HOST} port {port} for metrics: {error.strerror}; choose "
                "another --metrics_port"
            ) from error
        self.port = server.sockets[0].getsockname()[1]
        logger.info("metrics at http://%s:%d/metrics", _HOST, self.port)
        try:
            yield
        finally:
            server.close()

    def show(self, collector: ServerCollector) -> None:
        """Answer with these metrics from now on."""
        self._registry.register(collector)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        # A client that is slow, sends too much or goes away gets no answer.
        with contextlib.suppress(OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                status, body = b"404 Not Found", b""
                if head.startswith((b"GET /metrics ", b"GET /metrics?")):
                    status, body = b"200 OK", generate_latest(self._registry)
                writer.write(
                    b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n"
                    b"Connection: close\r\n\r\n%b"
                    % (status, CONTENT_TYPE_LATEST.encode(), len(body), body)
                )
                await writer.drain()
        writer.close()
