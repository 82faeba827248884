"""A session that is closed while it works opens nothing any more."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from written_swarm import server

from planetserve.client.ring import hop_setup
from planetserve.client.ring.hop_setup import HopSetup
from planetserve.client.session import InferenceSession
from planetserve.config import ClientConfig
from planetserve.errors import ConfigError, PlanetServeError, SessionClosed, StreamClosed
from planetserve.testing.clock import ManualClock
from planetserve.types import Chain, Hop
from planetserve.wire.step import RowSlice, StepTable

TABLE = StepTable((RowSlice(0, 0, 3),))
HIDDEN_TD = torch.zeros(3, 16)
HOP = Hop("a", 0, 8)


class LoopPortal:
    """Runs what other threads ask for on the test's loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    def post(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop)


class FailingRing:
    """Its step fails when it is closed."""

    is_broken = is_waiting = False
    leaving: frozenset[str] = frozenset()
    receipt_errors: tuple[PlanetServeError, ...] = ()

    def __init__(self) -> None:
        self.chain = Chain((HOP,))
        self.working = asyncio.Event()
        self.closed = asyncio.Event()

    def condemn_lost(self, before_s: float) -> None:
        pass

    async def step(self, *_: object, **__: object) -> torch.Tensor:
        self.working.set()
        await self.closed.wait()
        raise StreamClosed("gone")

    def condemn(self, *_: object) -> bool:
        return False

    async def close(self) -> None:
        self.closed.set()


class Manager:
    """Opens failing rings as soon as it may, and wants every failure retried."""

    config = ClientConfig()
    facts = SimpleNamespace(hidden_size=16)
    clock = ManualClock()
    rng = random.Random(1)

    def __init__(self) -> None:
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.asked = asyncio.Event()
        self.rings: list[FailingRing] = []
        self.failures: list[PlanetServeError] = []

    async def open_ring(self, *_: object) -> FailingRing:
        self.asked.set()
        await self.may_open.wait()
        self.rings.append(FailingRing())
        return self.rings[-1]

    async def report_failure(
        self, error: PlanetServeError, _chain: object, _lost_s: float
    ) -> tuple[str, ...]:
        self.failures.append(error)
        return ()

    def retry_delay_s(self, _error: PlanetServeError, _attempt: int) -> float:
        return 0.0


def session_of(manager: Manager) -> InferenceSession:
    return InferenceSession(manager, LoopPortal())  # type: ignore[arg-type]


async def test_a_step_whose_session_is_closed_is_not_tried_again() -> None:
    manager = Manager()
    session = session_of(manager)
    step = asyncio.create_task(asyncio.to_thread(session.run, 1, TABLE, HIDDEN_TD))
    await manager.asked.wait()
    await asyncio.sleep(0)
    await manager.rings[0].working.wait()
    await session.release()
    with pytest.raises(SessionClosed):
        await step
    assert len(manager.rings) == 1
    assert not manager.failures  # the end of its own ring is nobody's fault
    assert session.chain is None


async def test_servers_are_told_of_the_end_however_often_the_caller_is_cancelled() -> None:
    core = session_of(Manager())._core
    may_close, told = asyncio.Event(), asyncio.Event()

    async def close_slowly() -> None:
        await may_close.wait()
        told.set()

    ring = FailingRing()
    ring.close = close_slowly  # type: ignore[method-assign]
    core.ring = ring  # type: ignore[assignment]
    for _ in range(2):
        release = asyncio.create_task(core.release())
        await asyncio.sleep(0)
        release.cancel()
        await asyncio.gather(release, return_exceptions=True)
    may_close.set()
    await asyncio.wait_for(told.wait(), 10.0)


async def test_a_session_closed_between_two_attempts_makes_no_other() -> None:
    manager = Manager()
    session = session_of(manager)

    async def closed_meanwhile(
        _error: PlanetServeError, _chain: object, _lost_s: float
    ) -> tuple[str, ...]:
        await session.release()
        return ()

    manager.report_failure = closed_meanwhile  # type: ignore[method-assign]
    step = asyncio.create_task(asyncio.to_thread(session.run, 1, TABLE, HIDDEN_TD))
    await manager.asked.wait()
    await asyncio.sleep(0)
    manager.rings[0].closed.set()  # the ring fails by itself
    with pytest.raises(SessionClosed):
        await step
    assert len(manager.rings) == 1


async def test_a_text_that_outgrows_its_servers_goes_to_others() -> None:
    """By what they announce, before they would have to refuse it."""

    class ShortRing(FailingRing):
        max_row_tokens = 3
        loads_ms: dict[str, float] = {}

        async def step(self, _table: object, hidden_TD: torch.Tensor, **_: object) -> torch.Tensor:
            return hidden_TD

    class LongManager(Manager):
        def __init__(self) -> None:
            super().__init__()
            self.leases: list[Any] = []

        async def open_ring(self, _num_rows: object, lease_tokens: int, *_: object) -> FailingRing:
            self.leases.append(lease_tokens)
            self.rings.append(ShortRing())
            return self.rings[-1]

        def note_loads(self, *_: object) -> None:
            pass

    manager = LongManager()
    session = session_of(manager)
    await asyncio.to_thread(session.run, 1, TABLE, HIDDEN_TD)
    more = StepTable((RowSlice(0, 3, 2),))
    await asyncio.to_thread(session.run, 1, more, torch.zeros(2, 16))
    assert manager.leases == [3, 5]
    assert [ring.closed.is_set() for ring in manager.rings] == [True, False]
    await session.release()


async def test_what_no_server_could_run_goes_to_none() -> None:
    manager = Manager()
    session = session_of(manager)
    for hidden_TD in (torch.zeros(3, 8), torch.zeros(3, 16, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="16 floating-point numbers for each token"):
            session.run(1, TABLE, hidden_TD)
    with pytest.raises(ConfigError, match="no finite numbers"):
        session.run(1, TABLE, HIDDEN_TD.log())
    for inputs in (torch.zeros(3, 16), torch.zeros(1, 0, 16), [[1.0]]):
        with pytest.raises(ConfigError, match=r"\[batch, tokens, hidden\]"):
            session.step(inputs)  # type: ignore[arg-type]
    for rows in ([0, 5], [0], [0, -1]):
        with pytest.raises(ConfigError, match="hypo_ids must name"):
            session.step(torch.zeros(2, 1, 16), hypo_ids=torch.tensor(rows))
    for position in (1, "0", 0.0):
        with pytest.raises(ConfigError, match="can only be rolled back"):
            session.position = position  # type: ignore[assignment]
    for max_length in (0, 2.5, "9"):
        with pytest.raises(ConfigError, match="no number of tokens"):
            InferenceSession(manager, LoopPortal(), max_length=max_length)  # type: ignore[arg-type]
    assert manager.rings == []


async def test_a_ring_that_opens_after_its_session_was_closed_is_closed() -> None:
    manager = Manager()
    manager.may_open.clear()
    session = session_of(manager)
    step = asyncio.create_task(asyncio.to_thread(session.run, 1, TABLE, HIDDEN_TD))
    await manager.asked.wait()
    await session.release()
    manager.may_open.set()
    with pytest.raises(SessionClosed):
        await step
    assert [ring.closed.is_set() for ring in manager.rings] == [True]
    assert session.chain is None


async def test_hops_that_are_put_in_while_a_ring_is_closed_are_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opening, may_open = asyncio.Event(), asyncio.Event()
    closed: list[str] = []

    class SlowLink(hop_setup.HopConnection):
        async def open(self, *_: object, **__: object) -> None:
            opening.set()
            await may_open.wait()

        async def send_edge_keys(self, *_: object) -> None:
            pass

        async def close(self) -> None:
            closed.append(self.peer_id)

    monkeypatch.setattr(hop_setup, "HopConnection", SlowLink)
    nobody: Any = None
    hops = HopSetup(nobody, nobody, bytes(16), asyncio.Queue(), nobody, nobody)
    splice = asyncio.create_task(hops.splice(0, 0, [HOP], {"a": server("a")}, 0))
    await opening.wait()
    await hops.close()
    may_open.set()
    with pytest.raises(SessionClosed):
        await splice
    await asyncio.sleep(0)
    assert (hops.links, closed) == ([], ["a"])
