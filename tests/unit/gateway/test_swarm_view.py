"""What a gateway says of its swarm: uncovered blocks, changes, and texts that strangers wrote."""

from __future__ import annotations

from typing import Any

import pytest

from planetserve.client.planning.chain_changes import ChainChanges
from planetserve.errors import ConfigError, EdgeStalled, PeerReportedError, StreamClosed
from planetserve.gateway.swarm_view import uncovered
from planetserve.testing.clock import ManualClock
from planetserve.types import BlockSpan


class Info:
    def __init__(self, start: int, end: int):
        self.span = BlockSpan(start, end)


@pytest.mark.parametrize(
    ("spans", "missing"),
    [
        ([], [(0, 8)]),
        ([(0, 8)], []),
        ([(3, 8), (0, 3)], []),
        ([(0, 5), (1, 2), (6, 7)], [(5, 6), (7, 8)]),
        ([(2, 4)], [(0, 2), (4, 8)]),
        ([(0, 4), (9, 12)], [(4, 8)]),  # a stranger's record may say what it likes
    ],
)
def test_blocks_without_servers(spans: list[tuple[int, int]], missing: list[Any]) -> None:
    infos: Any = [Info(*span) for span in spans]
    assert uncovered(infos, 8) == missing


def test_a_failure_names_who_is_at_fault_and_its_words_are_cut() -> None:
    changes, heard = ChainChanges(ManualClock()), []
    changes.listeners.append(heard.append)
    error = PeerReportedError.of("A" * 50, "full", "\x1b[31m" + "x" * 9000)
    error.peer_id = "A" * 50
    changes.failed(error, ["B"])
    (change,) = changes.recent
    assert heard == [change]
    assert change.reason == "peer_reported"
    assert change.peer_ids == ("B", "A" * 50)
    assert len(change.text) < 400
    assert change.text.isprintable()


def test_own_mistakes_are_no_change_and_an_edge_names_both_ends() -> None:
    changes = ChainChanges(ManualClock())
    changes.failed(ConfigError("x"), [])
    assert not changes.recent
    stalled = EdgeStalled("x")
    stalled.edge = ("A", "B")
    changes.failed(stalled, [])
    assert changes.recent[-1].peer_ids == ("A", "B")


def test_only_the_latest_changes_are_kept() -> None:
    changes = ChainChanges(ManualClock())
    for number in range(500):
        changes.failed(StreamClosed(str(number)), [str(peer) for peer in range(500)])
    assert len(changes.recent) == 64
    assert changes.recent[-1].text == "499"
    assert len(changes.recent[-1].peer_ids) == 8
