"""Settings and measurements of an engine: plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from planetserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine serves its span.

    Attributes:
        attn_cache_tokens: tokens of KV cache, shared by all sessions.
        page_size: tokens per KV page; a runner may round it up for its attention backend.
        state_snapshots: earlier states of recurrent layers that each row keeps.
        max_batch_tokens: token budget of one forward pass.
        prefill_slowdown: maximum time of a batch with prompt tokens as a multiple of decode steps
            alone; see `scheduler/prefill_budget.py`.
        batch_delay_factor: decode steps wait for others that are about to come back while that
            takes less than this many times what a shared pass saves; see
            `scheduler/batch_delay.py`.
        inference_max_length: longest row a session may have.
        attention_backend: name in `planetserve.engine.attention.BACKENDS`.
        scheduling_policy: name in `planetserve.scheduler.policies.POLICIES`.
        num_threads: CPU threads of the engine thread; None leaves torch's choice.
        max_queued_steps: unfinished steps a session may have at once.
        max_peer_share: largest fraction of the KV cache that one peer's sessions may lease.
        kv_overcommit: pages promised to sessions as a multiple of the KV cache, where the runner
            allows it; above 1 sessions may lose pages for a while and get them back.
        max_page_wait_s: seconds after which a session with a step and no pages is ended.
        check_finite: refuse steps whose hidden states are not all finite numbers.
    """

    attn_cache_tokens: int
    page_size: int = 16
    state_snapshots: int = 2
    max_batch_tokens: int = 512
    prefill_slowdown: float = 1.7
    batch_delay_factor: float = 0.5
    inference_max_length: int = 2048
    attention_backend: str = "auto"
    scheduling_policy: str = "deficit_round_robin"
    num_threads: int | None = None
    max_queued_steps: int = 64
    max_peer_share: float = 1.0
    kv_overcommit: float = 1.0
    max_page_wait_s: float = 20.0
    check_finite: bool = False

    def __post_init__(self) -> None:
        if self.attn_cache_tokens < self.page_size:
            raise ConfigError(
                f"attn_cache_tokens {self.attn_cache_tokens} is less than one page of "
                f"{self.page_size} tokens; give more"
            )
        if not self.kv_overcommit >= 1 or not self.max_page_wait_s > 0:
            raise ConfigError("kv_overcommit must be at least 1 and max_page_wait_s above 0")
        if not self.batch_delay_factor >= 0:
            raise ConfigError(
                f"batch_delay_factor={self.batch_delay_factor:g} is negative; 0 turns waiting off"
            )
        if self.state_snapshots < 1:
            raise ConfigError(
                f"state_snapshots={self.state_snapshots} keeps no state to go back to; give at "
                "least 1"
            )
        num_threads = 1 if self.num_threads is None else self.num_threads
        if min(self.inference_max_length, self.max_queued_steps, num_threads) < 1:
            raise ConfigError(
                "inference_max_length, max_queued_steps and num_threads must be at least 1"
            )

    @property
    def num_pages(self) -> int:
        return self.attn_cache_tokens // self.page_size


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at one moment.

    Attributes:
        pages_total: pages of the KV cache.
        pages_used: pages that hold tokens, or stand for states of recurrent layers.
        live_tokens: tokens that these pages hold, as many as fit where they stand for states; one
            that several rows share counts once.
        kv_useful_share: fraction of these pages' slots that hold a token; 1 if no page is used.
        pages_leased: pages promised to open sessions.
        free_cache_tokens: tokens that new sessions could lease.
        num_sessions: open sessions.
        queued_tokens: tokens of accepted steps that have not run yet.
        sessions_waiting: sessions that have steps and no pages for them.
        preemptions: how often a session lost pages to others since the start.
        recomputed_tokens: tokens that ran once more because of that, or after a rollback of states.
        kept_input_bytes: inputs of open sessions that are kept to compute their KV cache again.
        decode_ms_per_block: what one block adds to a decode step's time, waiting for the steps of
            other sessions included; 0 before `Engine.measure`.
        alone_ms_per_block: the same while nothing else runs.
        overhead_ms: what a decode step takes besides, whatever its blocks.
        tokens_per_s_per_block: tokens per second through one block in large batches.
    """

    pages_total: int
    pages_used: int
    live_tokens: int
    kv_useful_share: float
    pages_leased: int
    free_cache_tokens: int
    num_sessions: int
    queued_tokens: int
    sessions_waiting: int
    preemptions: int
    recomputed_tokens: int
    kept_input_bytes: int
    decode_ms_per_block: float
    alone_ms_per_block: float
    overhead_ms: float
    tokens_per_s_per_block: float
