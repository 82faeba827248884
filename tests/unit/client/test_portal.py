"""Coroutines on a loop of their own, for threads that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from planetserve.client.portal import Portal
from planetserve.errors import SessionClosed


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal()
    yield made
    made.close()


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


async def fail() -> None:
    raise ValueError("the coroutine's own")


def test_results_and_errors_come_back_to_the_thread_that_asked(portal: Portal) -> None:
    assert portal.call(add(2, 3)) == 5
    with pytest.raises(ValueError, match="own"):
        portal.call(fail())


def test_closing_ends_calls_under_way_and_refuses_others(portal: Portal) -> None:
    started = threading.Event()

    async def wait() -> None:
        started.set()
        await asyncio.Event().wait()

    raised: list[BaseException] = []

    def call() -> None:
        try:
            portal.call(wait())
        except SessionClosed as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert started.wait(10)
    portal.close()
    thread.join(10)
    assert len(raised) == 1
    with pytest.raises(SessionClosed):
        portal.call(add(1, 1))


def test_an_interrupted_caller_cancels_what_it_waits_for(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
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

        def acquire(self) -> None:
            self.calls += 1
            if self.calls > 1:
                started.wait(10)  # a task that is cancelled before its first step runs nothing
                raise KeyboardInterrupt

        def release(self) -> None:
            pass

    own = threading.Lock
    monkeypatch.setattr(threading, "Lock", Interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            portal.call(wait())
    finally:
        monkeypatch.setattr(threading, "Lock", own)
    assert cancelled.wait(10)
