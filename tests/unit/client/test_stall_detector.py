"""Whom a client finds at fault by the progress of its hops when no answer comes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from planetserve.client.ring.stall_detector import StallDetector
from planetserve.errors import EdgeStalled, HopTimeout
from planetserve.types import CLIENT
from planetserve.wire.messages import Progress

LINKS: Any = [SimpleNamespace(peer_id=name) for name in "ABC"]
STALLED = "nothing passes between two servers"
TOO_SLOW = "no answer from the chain within 0.1 s"

Hop = tuple[int, int, int]
"""Frames received, frames sent and steps running."""


class ToldVigil(StallDetector):
    """Hops that answer every ping and are as far as the test says."""

    def __init__(self, hops: tuple[Hop, ...], stall_timeout_s: float):
        spec: Any = SimpleNamespace(
            probe_after_s=0.01, stall_timeout_s=stall_timeout_s, step_timeout_s=0.1
        )
        node: Any = None
        super().__init__(node, spec)
        self._told = [
            Progress(frames_received=got, frames_sent=sent, bytes_received=0, steps_running=running)
            for got, sent, running in hops
        ]

    async def _ask(self, _links: object) -> list[Progress]:
        return self._told


async def verdict(
    *hops: Hop, mine: tuple[int, int] = (10, 0), stall_timeout_s: float = 60.0
) -> HopTimeout:
    """What is made of the hops and the frames that the client has sent and received: at the step
    timeout, or before it if nothing may stand still for that long."""
    stall_detector = ToldVigil(hops, stall_timeout_s)
    with pytest.raises(HopTimeout) as caught:
        await stall_detector.watch(asyncio.Event().wait(), LINKS, lambda: mine)
    return caught.value


async def test_the_only_hop_that_computes_is_too_slow() -> None:
    error = await verdict((10, 10, 0), (10, 4, 1), (4, 4, 0))
    assert not isinstance(error, EdgeStalled)
    assert error.peer_id == "B"


@pytest.mark.parametrize(
    ("hops", "mine", "edge"),
    [
        (((10, 10, 0), (4, 4, 0), (4, 0, 0)), (10, 0), ("A", "B")),
        (((3, 3, 0), (3, 3, 0), (3, 0, 0)), (10, 0), (CLIENT, "A")),
        (((10, 10, 0), (10, 10, 0), (10, 10, 0)), (10, 3), ("C", CLIENT)),
        (((10, 10, 0), (9, 9, 0), (2, 2, 0)), (10, 0), ("B", "C")),
    ],
    ids=["between", "first", "last", "fullest of two"],
)
async def test_a_link_that_most_frames_wait_for_is_too_slow(
    hops: tuple[Hop, ...], mine: tuple[int, int], edge: tuple[str, str]
) -> None:
    error = await verdict(*hops, mine=mine)
    assert isinstance(error, EdgeStalled)
    assert str(error) == TOO_SLOW
    assert error.edge == edge
    assert error.peer_id is None


async def test_nobody_is_too_slow_where_several_compute_or_nothing_is_missing() -> None:
    for hops in [((10, 9, 1), (9, 4, 1), (4, 4, 0)), ((10, 10, 0), (10, 10, 0), (10, 10, 0))]:
        error = await verdict(*hops, mine=(10, 10))
        assert not isinstance(error, EdgeStalled)
        assert error.peer_id is None


@pytest.mark.parametrize(
    ("hops", "mine", "edge"),
    [
        (((0, 0, 0), (0, 0, 0), (0, 0, 0)), (3, 0), (CLIENT, "A")),
        (((3, 3, 0), (2, 2, 0), (2, 2, 0)), (3, 2), ("A", "B")),
        (((3, 3, 0), (3, 3, 0), (3, 3, 0)), (3, 2), ("C", CLIENT)),
    ],
)
async def test_more_went_into_a_broken_edge_than_came_out(
    hops: tuple[Hop, ...], mine: tuple[int, int], edge: tuple[str, str]
) -> None:
    error = await verdict(*hops, mine=mine, stall_timeout_s=0.02)
    assert isinstance(error, EdgeStalled)
    assert str(error) == STALLED
    assert error.edge == edge


async def test_a_broken_edge_holds_up_those_before_it() -> None:
    """A long replay fills what is before the break: the honest pairs there are not at fault."""
    hops = (35, 30, 0), (20, 15, 0), (2, 2, 0)
    broken = await verdict(*hops, mine=(60, 2), stall_timeout_s=0.02)
    assert (str(broken), broken.edge) == (STALLED, ("B", "C"))
    # While something still moves on all of them, none is broken, and the fullest is the slow one.
    slow = await verdict(*hops, mine=(60, 2))
    assert (str(slow), slow.edge) == (TOO_SLOW, (CLIENT, "A"))


async def test_nothing_stands_still_where_nothing_is_missing() -> None:
    hops = (3, 3, 0), (3, 3, 0), (3, 3, 0)
    computing = (3, 3, 0), (3, 3, 1), (3, 3, 0)
    error = await verdict(*computing, mine=(3, 3), stall_timeout_s=0.02)
    assert (type(error), str(error)) == (HopTimeout, TOO_SLOW)
    # A hop has swallowed the step, and any of them may have.
    error = await verdict(*hops, mine=(3, 3), stall_timeout_s=0.02)
    assert not isinstance(error, EdgeStalled)
    assert "lost a step" in str(error)
    assert error.peer_id is None
