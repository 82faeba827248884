"""What Prometheus reads at /metrics: vLLM's names for what means the same here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from planetserve.client.planning.chain_changes import ChainChange
from planetserve.gateway.text import TextRequest, TextTimes

_SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LABELS = ("model_name", "engine")


class MetricFamilies:
    """The metrics of one gateway, in a registry of its own; its models differ by a label."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._made: dict[str, Any] = {}

    def get(
        self, kind: Any, name: str, text: str, labels: Sequence[str] = _LABELS, **kwargs: Any
    ) -> Any:
        """The metric of this name, made the first time."""
        if name not in self._made:
            self._made[name] = kind(name, text, labels, registry=self._registry, **kwargs)
        return self._made[name]

    def http_ended(self, handler: str, method: str, status: int, elapsed_s: float) -> None:
        """A response has been sent."""
        labels = ("handler", "method")
        count = self.get(Counter, "http_requests", "HTTP requests.", (*labels, "status"))
        count.labels(handler, method, str(status)).inc()
        duration_s = self.get(
            Histogram, "http_request_duration_seconds", "Until the response ended.", labels,
            buckets=_LONG_S,
        )  # fmt: skip
        duration_s.labels(handler, method).observe(elapsed_s)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class Metrics:
    """The metrics of one model.

    Args:
        model: value of the label `model_name`.
        families: shared by the models of a gateway.
    """

    def __init__(self, model: str, families: MetricFamilies):
        self._label = model, "0"
        self._families = families
        self._running = self._gauge("num_requests_running", "Texts that are generated.")
        self._waiting = self._gauge("num_requests_waiting", "Prompts that wait for others.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._queried = self._counter("prefix_cache_queries", "Tokens looked up in warm sessions.")
        self._hits = self._counter("prefix_cache_hits", "Tokens of prompts found in them.")
        self._hit_sessions = families.get(
            Counter, "planetserve:warm_session_hits", "Prompts that went on from a warm session."
        ).labels(*self._label)
        self._warm = families.get(
            Gauge, "planetserve:warm_sessions", "Sessions kept after their texts."
        ).labels(*self._label)
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._ended = families.get(
            Counter, "vllm:request_success", "Texts by how they ended.",
            (*_LABELS, "finished_reason"),
        )  # fmt: skip
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds", "From request to first token.", _LONG_S[:-2]
        )
        self._between_s = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a text.", _SHORT_S
        )
        self._whole_s = self._histogram(
            "e2e_request_latency_seconds", "From request to last token.", _LONG_S
        )
        self._queue_s = self._histogram(
            "request_queue_time_seconds", "Waiting for other texts.", _LONG_S
        )
        self._prompt_sizes = self._histogram("request_prompt_tokens", "Prompt sizes.", _TOKENS)
        self._step_s = families.get(
            Histogram, "planetserve:step_seconds", "One token's way around its chain.",
            buckets=_SHORT_S,
        ).labels(*self._label)  # fmt: skip
        self._failovers = families.get(
            Counter, "planetserve:failovers", "Failures and moves of texts, by reason.",
            (*_LABELS, "reason"),
        )  # fmt: skip
        self._hops = families.get(
            Gauge, "planetserve:chain_hops", "Servers in the chain that was used last."
        ).labels(*self._label)

    def watch_waiting(self, count: Callable[[], int]) -> None:
        """Ask `count` for the prompts that wait."""
        self._waiting.set_function(count)

    def watch_warm(self, count: Callable[[], int]) -> None:
        """Ask `count` for the sessions that are kept."""
        self._warm.set_function(count)

    def watch_swarm(self, ready: Callable[[], int], uncovered: Callable[[], int]) -> None:
        """Ask for the servers that can be used, and the blocks that none of them runs."""
        for name, text, ask in (
            ("ready_servers", "Servers that can be used.", ready),
            ("uncovered_blocks", "Blocks that no usable server runs.", uncovered),
        ):
            gauge = self._families.get(Gauge, f"planetserve:{name}", text)
            gauge.labels(*self._label).set_function(ask)

    def chain_changed(self, change: ChainChange) -> None:
        """A text has lost or left servers."""
        self._failovers.labels(*self._label, change.reason).inc()

    def step_done(self, elapsed_s: float, num_hops: int) -> None:
        """A step has gone around a chain."""
        self._step_s.observe(elapsed_s)
        self._hops.set(num_hops)

    def prefix_looked_up(self, num_tokens: int, num_found: int) -> None:
        """A prompt has been compared with what warm sessions hold."""
        self._queried.inc(num_tokens)
        self._hits.inc(num_found)
        self._hit_sessions.inc(bool(num_found))

    @contextlib.contextmanager
    def running(self, num_texts: int) -> Iterator[None]:
        """Count `num_texts` texts as running while the block runs."""
        self._running.inc(num_texts)
        try:
            yield
        finally:
            self._running.dec(num_texts)

    def prompt_done(self, num_tokens: int) -> None:
        """A prompt has gone through the chain."""
        self._prompt_tokens.inc(num_tokens)
        self._prompt_sizes.observe(num_tokens)

    def tokens_done(self, num_tokens: int, times: TextTimes) -> None:
        """The rows of one text have got a token each."""
        now_s = time.monotonic()
        if times.first_token_s:
            self._between_s.observe(now_s - times.last_token_s)
        else:
            times.first_token_s = now_s
            self._first_token_s.observe(now_s - times.asked_s)
        times.last_token_s = now_s
        self._generated.inc(num_tokens)

    def text_ended(self, request: TextRequest, times: TextTimes, reasons: Sequence[str]) -> None:
        """One prompt's answers have ended, each for a reason."""
        for reason in reasons:
            self._ended.labels(*self._label, reason).inc()
        if times.started_s:
            self._queue_s.observe(times.started_s - times.asked_s)
        if len(reasons) == request.n and not {"abort", "error"} & {*reasons}:
            self._whole_s.observe(time.monotonic() - times.asked_s)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge: Gauge = self._families.get(Gauge, f"vllm:{name}", text)
        return gauge.labels(*self._label)

    def _counter(self, name: str, text: str) -> Counter:
        counter: Counter = self._families.get(Counter, f"vllm:{name}", text)
        return counter.labels(*self._label)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made: Histogram = self._families.get(
            Histogram, f"vllm:{name}", text, buckets=tuple(buckets)
        )
        return made.labels(*self._label)
