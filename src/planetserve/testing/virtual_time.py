"""An event loop whose time advances only when nothing is left to do at the present time.

Simulated hours take only the time of their computations, and the same events happen at the same
times in every run. Nothing here waits for a file, a socket or a thread: work for a thread runs at
once, in place.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import override

T = TypeVar("T")

_START_S = 1000.0
_START_UNIX_S = 1_800_000_000.0
_MAX_TURNS_AT_ONCE = 100_000
"""Turns of the loop in which no time passes; more mean that something spins."""


class StuckError(Exception):
    """Nothing is left to do, or something is done forever, and whoever runs the loop waits."""


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """An event loop without files, which `run` makes.

    What is due at the same moment runs in the order in which it was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = 0.0
        """How far the code that runs now, as of another thread, is ahead of the loop's time."""
        self._now_s = _START_S
        self._due: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._num_cancelled = 0
        self._stopping = False

    @override
    def time(self) -> float:
        return self._now_s

    @override
    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._due.append(handle)
        return handle

    @override
    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        timer._scheduled = True  # type: ignore[attr-defined]  # noqa: SLF001 - it tells when cancelled
        return timer

    @override
    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """What another thread says arrives when the loop has come as far as that thread is."""
        if self.ahead_s > 0:
            return self.call_later(self.ahead_s, callback, *args, context=context)
        return self.call_soon(callback, *args, context=context)

    def _timer_handle_cancelled(self, _timer: asyncio.TimerHandle) -> None:
        self._num_cancelled += 1
        if self._num_cancelled > 100 + len(self._timers) // 2:
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._num_cancelled = 0

    def _run_once(self) -> None:
        """Run until the loop is stopped: `BaseEventLoop` waits for files here, between calls."""
        due, num_turns = self._due, 0
        while not self._stopping:
            num_turns += 1
            timers = self._timers
            if not due:
                if not timers:
                    raise StuckError("nothing is left to do")
                if timers[0][0] > self._now_s:
                    self._now_s, num_turns = timers[0][0], 0
            if num_turns > _MAX_TURNS_AT_ONCE:
                raise StuckError("no time passes any more")
            while timers and timers[0][0] <= self._now_s:
                timer = heapq.heappop(timers)[2]
                timer._scheduled = False  # type: ignore[attr-defined]  # noqa: SLF001
                if timer.cancelled():
                    self._num_cancelled -= 1
                else:
                    due.append(timer)
            for _ in range(len(due)):
                handle = due.popleft()
                if not handle._cancelled:  # noqa: SLF001 - as every event loop does
                    handle._run()  # noqa: SLF001

    @override
    def run_in_executor(  # type: ignore[override]
        self, _executor: object, work: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(work(*args))
        except Exception as error:  # noqa: BLE001 - the future carries it
            future.set_exception(error)
        return future


@dataclass(frozen=True, slots=True)
class ClockError:
    """The error of a machine's clock.

    Attributes:
        ahead_s: by how much its time of day is ahead at the start.
        drift: by how much a second of it is too short.
        uptime_s: what its monotonic time is at the start.
    """

    ahead_s: float = 0.0
    drift: float = 0.0
    uptime_s: float = 0.0


class VirtualClock:
    """The clock of a machine in virtual time.

    Args:
        loop: whose time it is.
        error: by what the machine's own differs from that.
    """

    def __init__(self, loop: VirtualTimeLoop, error: ClockError | None = None):
        self._loop = loop
        self._error = error or ClockError()

    def monotonic(self) -> float:
        return self._error.uptime_s + self._passed_s()

    def unix(self) -> float:
        return _START_UNIX_S + self._error.ahead_s + self._passed_s()

    def _passed_s(self) -> float:
        return (self._loop.time() + self._loop.ahead_s) * (1.0 + self._error.drift)


def run(main: Callable[[VirtualTimeLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in virtual time, from the same moment each time.

    Raises:
        StuckError: it waits for what never comes.
    """
    loop = VirtualTimeLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main(loop))
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=60.0))
        loop.close()
        asyncio.set_event_loop(None)
