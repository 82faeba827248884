"""What a client makes of the progress of its hops when no answer comes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from planetserve.client.vigil import Vigil
from planetserve.errors import EdgeStalled
from planetserve.types import CLIENT
from planetserve.wire.messages import Progress

LINKS = [SimpleNamespace(peer_id=name) for name in "ABC"]
SPEC = SimpleNamespace(step_timeout_s=4.0)


def verdict(*hops: tuple[int, int, int], mine: tuple[int, int] = (10, 0)):
    """From frames received, frames sent and steps running of each hop, and the client's frames."""
    progress = [
        Progress(frames_received=got, frames_sent=sent, bytes_received=0, steps_running=running)
        for got, sent, running in hops
    ]
    return Vigil(None, SPEC)._too_slow(LINKS, progress, mine)


def test_the_only_hop_that_computes_is_too_slow():
    error = verdict((10, 10, 0), (10, 4, 1), (4, 4, 0))
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
def test_frames_that_pile_up_name_their_edge(hops, mine, edge):
    error = verdict(*hops, mine=mine)
    assert isinstance(error, EdgeStalled)
    assert error.edge == edge
    assert error.peer_id is None


def test_nobody_is_named_where_several_compute_or_nothing_is_missing():
    for hops in [((10, 9, 1), (9, 4, 1), (4, 4, 0)), ((10, 10, 0), (10, 10, 0), (10, 10, 0))]:
        error = verdict(*hops, mine=(10, 10))
        assert not isinstance(error, EdgeStalled)
        assert error.peer_id is None
