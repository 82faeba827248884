"""Times decode steps of an engine that has no sessions yet, on the path that real steps take.

Steps run through all blocks and through one block, to separate the time per block from the constant
time of a step. A short prompt gives the speed of large passes.
"""

from __future__ import annotations

import asyncio
import functools
import statistics

import torch

from planetserve.clock import Clock
from planetserve.engine.job import Job
from planetserve.engine.span_runner import SpanRunner
from planetserve.engine.worker import Worker
from planetserve.scheduler.batch import StepRequest
from planetserve.scheduler.speed import StepCost
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice

_SESSION = b"measure"
_ITEM = -1
_PREFILL_TOKENS = 64
_NUM_DECODES = 8
_LIMIT_S = 0.4


async def measure_cost(
    worker: Worker, runner: SpanRunner, clock: Clock, max_length: int
) -> StepCost:
    """What a decode step costs on a running worker without sessions; leaves its cache empty.

    Raises:
        RemoteError: the pass failed.
    """
    span = runner.span
    all_ms = await _decode_ms(worker, runner, clock, span, max_length)
    one_ms = None
    if len(span) > 1:
        first = BlockSpan(span.start, span.start + 1)
        one_ms = await _decode_ms(worker, runner, clock, first, max_length)
    return StepCost.fit(all_ms, one_ms, len(span))


async def _decode_ms(
    worker: Worker, runner: SpanRunner, clock: Clock, span: BlockSpan, max_length: int
) -> float:
    """Typical time of a decode step through `span`, in milliseconds."""
    prefill = max(1, min(_PREFILL_TOKENS, max_length - 1 - _NUM_DECODES))
    deadline_s = clock.monotonic() + _LIMIT_S
    took_ms: list[float] = []
    start = 0
    worker.post(functools.partial(worker.open, _SESSION, 1, span))
    try:
        # The first step also warms caches and allocators up.
        for count in [1, prefill, *[1] * _NUM_DECODES]:
            if start + count > max_length or (start and clock.monotonic() > deadline_s):
                break
            item = StepRequest(_ITEM, _SESSION, (RowSlice(0, start, count),))
            future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
            started_s = clock.monotonic()
            job = Job(item, None, torch.randn(count, runner.hidden_size), future, started_s)
            worker.post(functools.partial(worker.accept, job))
            await future
            if count == 1:
                took_ms.append(1000 * (clock.monotonic() - started_s))
            start += count
    finally:
        worker.post(functools.partial(worker.forget, _SESSION))
    # Other load on the machine only adds time, so the median of the faster half is used.
    steps = sorted(took_ms[1:] or took_ms)
    return statistics.median(steps[: (len(steps) + 1) // 2])
