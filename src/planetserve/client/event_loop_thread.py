"""A background event loop, so that synchronous `generate()` can use the asynchronous swarm client.

One thread per model runs one loop until `close()`. Any thread but this one may call it. A forked
child has no such thread: a call there is an error, and does not affect the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from planetserve.errors import ConfigError, SessionClosed
from planetserve.swarm.libp2p.forks import own_selector

T = TypeVar("T")

_CANCEL_S = 5.0


class EventLoopThread:
    """Runs coroutines on its own loop and hands their results to the calling thread."""

    def __init__(self, name: str = "planetserve-client"):
        self._owner = os.getpid()
        self._loop = asyncio.SelectorEventLoop(own_selector())
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closed = False
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether `close()` has been called."""
        return self._closed

    @property
    def in_child(self) -> bool:
        """Whether this process was forked from the one that owns the thread."""
        return os.getpid() != self._owner

    def check_process(self) -> None:
        """Refuse to work in a forked child.

        Raises:
            ConfigError: this process is one.
        """
        if self.in_child:
            raise ConfigError(
                "this model was loaded before the process was forked and works in the parent "
                "alone; load it in the child, or start processes with the method 'spawn'"
            )

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` and return its result; Ctrl-C in the caller cancels it and waits a few
        seconds for its end.

        Raises:
            SessionClosed: the event loop thread is closed.
            ConfigError: this is a forked child.
        """
        if self.in_child:
            coroutine.close()
            self.check_process()
        if self._closed:
            coroutine.close()
            raise SessionClosed("the model has been closed; load it again to use it")
        # `run_coroutine_threadsafe` takes two futures and a condition for this, and every token
        # comes through here.
        is_done = threading.Lock()
        is_done.acquire()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            task = self._loop.create_task(coroutine)
            task.add_done_callback(lambda _: is_done.release())
            tasks.append(task)

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # interrupted before it could start
                coroutine.close()
                is_done.release()

        try:
            self._loop.call_soon_threadsafe(start)
            is_done.acquire()
        except BaseException:
            self._loop.call_soon_threadsafe(cancel)
            # What comes next, a call for the same session say, must not meet it half-way.
            is_done.acquire(timeout=_CANCEL_S)
            raise
        try:
            return tasks[0].result()
        except asyncio.CancelledError as error:
            raise SessionClosed("the model was closed while it was working") from error

    def post(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run `coroutine` without waiting; dropped when the event loop thread is closed."""
        if self._closed or self.in_child:
            coroutine.close()
            return
        asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what is running, stop the loop and join the thread. Idempotent."""
        if self._closed or self.in_child:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            with contextlib.suppress(RuntimeError):
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
