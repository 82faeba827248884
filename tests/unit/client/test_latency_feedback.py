"""What hops say of their loads counts as far as the client's own clock bears it out."""

from __future__ import annotations

import pytest
from written_swarm import server

from planetserve.client.planning.latency_feedback import LatencyFeedback
from planetserve.testing.clock import ManualClock
from planetserve.types import Chain, Hop

CHAIN = Chain((Hop("a", 0, 6), Hop("b", 6, 8)))


@pytest.mark.parametrize(
    ("said", "elapsed_ms", "counted"),
    [
        ({"a": 2.0, "b": 4.0}, 100.0, {"a": 2.0, "b": 4.0}),
        ({"a": 1.0}, 6.0, {"a": 1.0, "b": 1.0}),
        # No hop can have spent 4,000,000 ms a block within a step of 40 ms.
        ({"a": 4e6, "b": 1.0}, 40.0, {"a": 40 / 6, "b": 0.0}),
        ({"a": 5.0, "b": 5.0}, 20.0, {"a": 2.5, "b": 2.5}),
    ],
)
def test_loads_together_count_for_no_more_than_the_step_took(
    said: dict[str, float], elapsed_ms: float, counted: dict[str, float]
) -> None:
    feedback = LatencyFeedback(max_peers=8, clock=ManualClock())
    feedback.record_loads(CHAIN, said, elapsed_ms)
    for name, ms in counted.items():
        loaded = feedback.with_reported_load(server(name)).decode_ms_per_block
        assert loaded == pytest.approx(ms, abs=1e-4)
