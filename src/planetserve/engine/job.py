"""A step on its way through the engine, and the way of its result back to the event loop."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import torch

from planetserve.errors import PlanetServeError
from planetserve.scheduler.batch import StepRequest
from planetserve.wire.step import StepTable

logger = logging.getLogger(__name__)

_Result = tuple["asyncio.Future[torch.Tensor]", torch.Tensor | PlanetServeError]


@dataclass(slots=True, eq=False)
class Job:
    """A submitted step on its way through the engine."""

    item: StepRequest
    positions: tuple[int, ...] | None
    hidden_TD: torch.Tensor
    future: asyncio.Future[torch.Tensor]
    submitted_s: float
    outputs: list[torch.Tensor] = field(default_factory=list)
    ran_alone: bool = False
    """Whether nothing else was in the engine between its arrival and its result."""

    @property
    def table(self) -> StepTable:
        """The step's tokens and what it does to rows."""
        return StepTable(self.item.rows, self.positions, self.item.reorder)


class Results:
    """Results of jobs that their event loops have not heard of yet. Of the engine thread."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Job, torch.Tensor | PlanetServeError]] = []

    def add(self, job: Job, value: torch.Tensor | PlanetServeError) -> None:
        """A job is done, or has failed."""
        self._waiting.append((job, value))

    def hand_over(self) -> None:
        """Resolve the futures of all jobs added, with one wake-up per event loop."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        by_loop: dict[asyncio.AbstractEventLoop, list[_Result]] = {}
        for job, value in waiting:
            by_loop.setdefault(job.future.get_loop(), []).append((job.future, value))
        for loop, results in by_loop.items():
            try:
                loop.call_soon_threadsafe(_resolve, results)
            except RuntimeError:
                logger.debug("%d results for an event loop that is closed", len(results))


def _resolve(results: list[_Result]) -> None:
    for future, value in results:
        if future.done():
            continue
        if isinstance(value, PlanetServeError):
            future.set_exception(value)
            # asyncio logs an exception that nobody asks for; the session may have ended meanwhile.
            future.exception()
        else:
            future.set_result(value)
