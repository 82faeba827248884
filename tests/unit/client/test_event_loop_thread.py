"""Coroutines on a loop of their own, for threads that wait."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from planetserve.client.event_loop_thread import EventLoopThread
from planetserve.errors import ConfigError, SessionClosed


@pytest.fixture
def loop_thread() -> Iterator[EventLoopThread]:
    made = EventLoopThread()
    yield made
    made.close()


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


async def fail() -> None:
    raise ValueError("the coroutine's own")


def test_results_and_errors_come_back_to_the_thread_that_asked(
    loop_thread: EventLoopThread,
) -> None:
    assert loop_thread.call(add(2, 3)) == 5
    with pytest.raises(ValueError, match="own"):
        loop_thread.call(fail())


def test_closing_ends_calls_under_way_and_refuses_others(loop_thread: EventLoopThread) -> None:
    started = threading.Event()

    async def wait() -> None:
        started.set()
        await asyncio.Event().wait()

    raised: list[BaseException] = []

    def call() -> None:
        try:
            loop_thread.call(wait())
        except SessionClosed as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert started.wait(10)
    loop_thread.close()
    thread.join(10)
    assert len(raised) == 1
    with pytest.raises(SessionClosed):
        loop_thread.call(add(1, 1))


def test_an_interrupted_caller_cancels_what_it_waits_for(
    loop_thread: EventLoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def wait() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    class Interrupted:
        """A lock whose second acquisition, the wait, is interrupted."""

        def __init__(self) -> None:
            self.calls = 0

        def acquire(self, timeout: float = -1) -> None:
            self.calls += 1
            if self.calls == 2:
                started.wait(10)  # a task that is cancelled before its first step runs nothing
                raise KeyboardInterrupt

        def release(self) -> None:
            pass

    own = threading.Lock
    monkeypatch.setattr(threading, "Lock", Interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop_thread.call(wait())
    finally:
        monkeypatch.setattr(threading, "Lock", own)
    assert cancelled.wait(10)


def test_what_was_interrupted_has_ended_before_the_caller_goes_on(
    loop_thread: EventLoopThread,
) -> None:
    steps = []

    async def wait() -> None:
        steps.append("began")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.2)
            steps.append("ended")

    with pytest.raises(KeyboardInterrupt):
        loop_thread.call(wait())
    assert steps == ["began", "ended"]
    assert loop_thread.call(add(2, 3)) == 5


def test_in_a_forked_child_calls_are_refused_and_closing_does_nothing(
    loop_thread: EventLoopThread,
) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        told = ""
        try:
            loop_thread.call(add(1, 1))
        except ConfigError as error:
            told = str(error)
        loop_thread.close()
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as words:
        assert "loaded before the process was forked" in words.read()
    assert os.waitpid(child, 0)[1] == 0
    assert loop_thread.call(add(2, 3)) == 5
