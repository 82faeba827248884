"""`planetserve estimate` with a swarm says what a user would get there now, or why nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planetserve.commands import estimate
from planetserve.testing.swarm import LocalSwarm


def estimated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    estimate.main([*arguments, "--torch_dtype", "float32", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_swarm_now_against_this_machine(
    swarm: LocalSwarm, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = estimated(capsys, str(llama_folder), "--initial_peers", *swarm.initial_peers)
    assert found["live_tokens_per_s"] > 0
    assert found["live_error"] is None
    better = "the swarm" if found["live_tokens_per_s"] > found["alone_tokens_per_s"] else "here"
    assert better in found["verdict"]


def test_a_swarm_without_the_model_is_not_waited_for(
    swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    found = estimated(capsys, "demo", "--initial_peers", *swarm.initial_peers)
    assert found["live_tokens_per_s"] is None
    assert "no server of demo" in found["live_error"]
    assert found["alone_tokens_per_s"] > 0
