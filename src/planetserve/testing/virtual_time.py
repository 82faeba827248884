"""An event loop whose time passes only when nothing is left to do at the present moment.

What would take hours takes as long as its computations, and the same events happen at the same
times in every run. Nothing here waits for a file, a socket or a thread: what would run in a thread
runs at once, in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from typing_extensions import override

T = TypeVar("T")

_START_S = 1000.0
_START_UNIX_S = 1_800_000_000.0


class StuckError(Exception):
    """Nothing is left to do, and whoever runs the loop still waits."""


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """An event loop without a selector. `run` makes one."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self
        self._now_s = _START_S
        self.ahead_s = 0.0
        """How far the code that runs now, as of another thread, is ahead of the loop's time."""

    @override
    def time(self) -> float:
        return self._now_s

    def select(self, timeout_s: float | None) -> tuple[()]:
        """Let time pass until the next timer; `BaseEventLoop` waits for files here."""
        if timeout_s is None:
            raise StuckError("nothing is left to do")
        self._now_s += timeout_s
        return ()

    def _process_events(self, _events: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    @override
    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """What another thread says arrives when the loop has come as far as that thread is."""
        if self.ahead_s > 0:
            return self.call_later(self.ahead_s, callback, *args, context=context)
        return self.call_soon(callback, *args, context=context)

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


class VirtualClock:
    """The clock of a machine in virtual time.

    Args:
        loop: whose time it is.
        skew_s: by how much the machine's clock is ahead.
    """

    def __init__(self, loop: VirtualTimeLoop, skew_s: float = 0.0):
        self._loop = loop
        self._skew_s = skew_s

    def monotonic(self) -> float:
        return self._loop.time() + self._loop.ahead_s

    def unix(self) -> float:
        return _START_UNIX_S + self.monotonic() + self._skew_s


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
