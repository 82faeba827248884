"""F22: a client that vanishes, at whatever moment, leaves nothing behind at its server."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import psutil
import pytest
import torch
from hostile import Stranger, Target, until

from planetserve.server.server import Server
from planetserve.testing.swarm import LocalSwarm

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def engine_held_up(server: Server) -> Iterator[threading.Event]:
    """The engine thread does nothing until the event is set."""
    go_on = threading.Event()
    server.engine._worker.post(lambda: go_on.wait(60) and None)
    yield go_on
    go_on.set()


async def opened_only(stranger: Stranger) -> None:
    await stranger.open(edge_keys=False)


async def in_a_prefill(stranger: Stranger) -> None:
    session = await stranger.open(max_length=128)
    await session.send(*session.sealed(*session.numbers_for(120)))


async def in_a_decode(stranger: Stranger) -> None:
    session = await stranger.open(max_length=64, num_rows=2)
    await session.step(20)
    table, hidden_TD = session.numbers_for(1, start=20)
    await session.send(*session.sealed(table, hidden_TD))


async def in_the_middle_of_a_frame(stranger: Stranger) -> None:
    session = await stranger.open(max_length=64)
    header, payload = session.sealed(*session.numbers_for(30))
    cut = header.pack() + payload[: len(payload) // 2]
    await asyncio.get_running_loop().sock_sendall(session.control._socket, cut)


async def with_much_unread(stranger: Stranger) -> None:
    session = await stranger.open(max_length=128)
    hidden_TD = torch.zeros(20, session.target.hidden_size)
    table, _ = session.numbers_for(20)
    for number in range(6):
        await session.send(*session.sealed(table, hidden_TD, step=number))


MOMENTS = (opened_only, in_a_prefill, in_a_decode, in_the_middle_of_a_frame, with_much_unread)


async def vanish(stranger: Stranger) -> None:
    """What the network sees of a killed client: its daemon is gone from one moment to the next."""
    os.kill(stranger.node._daemon._child.pid, signal.SIGKILL)
    await stranger.node.stopped.wait()
    await stranger.node.close()


async def held(swarm: LocalSwarm) -> tuple[int, int, int]:
    """Tasks of the swarm's loop, and open files and threads of this process."""

    async def num_tasks() -> int:
        return len(asyncio.all_tasks())

    process = psutil.Process()
    tasks = await asyncio.to_thread(swarm._loop_thread.call, num_tasks())
    return tasks, process.num_fds(), process.num_threads()


async def is_empty(server: Server) -> None:
    await until(lambda: not server.handler.num_sessions)
    await until(lambda: server.engine.stats().pages_used == 0)
    stats = server.engine.stats()
    assert (stats.pages_leased, stats.num_sessions, stats.queued_tokens) == (0, 0, 0)
    assert server.handler.queued_bytes == 0


@pytest.mark.parametrize("moment", MOMENTS)
async def test_memory_is_free_although_the_engine_is_busy(
    swarm: LocalSwarm, server: Server, engine_held_up: threading.Event, moment: object
) -> None:
    """The promise is taken back at once, the pages when the engine comes to it."""
    stranger = await Stranger.join(swarm.initial_peers, Target.of_server(server))
    if moment is in_a_decode:
        engine_held_up.set()
    await moment(stranger)  # type: ignore[operator]
    assert server.engine.stats().pages_leased > 0
    await vanish(stranger)
    await until(lambda: server.engine.stats().pages_leased == 0)
    engine_held_up.set()
    await is_empty(server)


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.faults)])
@pytest.mark.timeout(600)
async def test_nothing_adds_up(swarm: LocalSwarm, server: Server, rounds: int) -> None:
    target = Target.of_server(server)

    async def one_of_each() -> None:
        for moment in MOMENTS:
            stranger = await Stranger.join(swarm.initial_peers, target)
            await moment(stranger)
            await vanish(stranger)
        await is_empty(server)

    await one_of_each()
    before = await held(swarm)
    for _ in range(rounds):
        await one_of_each()
    for now, then in zip(await held(swarm), before, strict=True):
        assert now <= then + 2
    honest = await Stranger.join(swarm.initial_peers, target)
    assert (await (await honest.open()).step(2)).shape[0] == 2
    await honest.node.close()
