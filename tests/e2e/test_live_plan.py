"""`planetserve plan` on a real swarm shows what a client gets, and can be replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planetserve.errors import ConfigError, MissingBlocksError, ModelMismatchError
from planetserve.plan import main
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.testing.swarm import LocalSwarm


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main([*arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_live_plan_is_saved_and_replayed(
    swarm: LocalSwarm,
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "swarm.json"
    found = planned(
        capsys, str(llama_folder), "--initial_peers", *swarm.initial_peers,
        "--optimizer", "pareto_exact", "--save_snapshot", str(file),
    )  # fmt: skip
    spans = {server.node.peer_id: server.info().span for server in swarm.servers}
    snapshot = SwarmSnapshot.load(file)
    assert {server.id: server.span for server in snapshot.servers} == spans
    assert snapshot.num_blocks == found["num_blocks"] == 6
    assert snapshot.activation_bytes_per_token == 4 * 32
    first = next(server for server in swarm.servers if server.info().span.start == 0)
    assert first.node.peer_id in snapshot.rtt_ms["client"]
    for chain in found["chains"]:
        assert [hop["start"] for hop in chain["hops"]] == [
            0,
            *[hop["end"] for hop in chain["hops"][:-1]],
        ]
        assert chain["tokens_per_s"] == pytest.approx(1000 / chain["latency_ms"])
    again = planned(capsys, "--snapshot", str(file), "--optimizer", "pareto_exact")
    assert again["chains"] == found["chains"]


def test_a_live_plan_for_people(
    swarm: LocalSwarm, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(llama_folder), "--initial-peers", *swarm.initial_peers])
    text = capsys.readouterr().out
    assert "tokens/s for one user alone" in text
    assert all(f"  {server.node.peer_id}\n" in text for server in swarm.servers)


def test_blocks_that_no_server_has_are_named(
    swarm: LocalSwarm, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = next(server for server in swarm.servers if server.info().span.end == 6)
    with pytest.raises(MissingBlocksError, match="blocks 5:6 .*blocked_servers"):
        main(
            [str(llama_folder), "--initial_peers", *swarm.initial_peers,
             "--blocked_servers", last.node.peer_id, "--wait_for_blocks_timeout", "0"]
        )  # fmt: skip
    assert capsys.readouterr().out == ""


def test_another_model_and_a_wrong_peer_are_refused(
    swarm: LocalSwarm, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    join = ["--initial_peers", *swarm.initial_peers, "--wait_for_blocks_timeout", "0"]
    with pytest.raises(ModelMismatchError, match="no server of demo .* which serves llama-"):
        main(["demo", *join])
    with pytest.raises(ConfigError, match="allowed_servers: 'me' is no peer id"):
        main([str(llama_folder), *join, "--allowed_servers", "me"])
    assert capsys.readouterr().out == ""
