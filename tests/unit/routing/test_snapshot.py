"""The snapshot: what it accepts, what it refuses, and that a file says the same as the object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planetserve.errors import ConfigError
from planetserve.routing.snapshot import MAX_SNAPSHOT_BYTES, ServerPoint, SwarmSnapshot
from planetserve.testing.brute_force import random_snapshot
from planetserve.types import CLIENT


def document() -> dict[str, Any]:
    return {
        "version": 1,
        "num_blocks": 8,
        "activation_bytes_per_token": 8192,
        "hop_overhead_ms": 2.0,
        "default_rtt_ms": 40.0,
        "servers": [
            {
                "id": name,
                "start": start,
                "end": end,
                "decode_ms_per_block": 1.5,
                "tokens_per_s_per_block": 4000.0,
                "network_bytes_per_s": 12500000.0,
                "free_cache_tokens": 8192,
            }
            for name, start, end in [("s1", 0, 6), ("s2", 4, 8)]
        ],
        "rtt_ms": {"client": {"s1": 20.0}, "s1": {"s2": 12.0}},
    }


def test_reads_a_document_with_defaults() -> None:
    snapshot = SwarmSnapshot.from_json(json.dumps(document()))
    assert [server.id for server in snapshot.servers] == ["s1", "s2"]
    assert snapshot.servers[0].reputation == 1.0
    assert snapshot.servers[0].price == 0.0
    assert snapshot.missing_blocks() == ()


def test_rtt_is_symmetric_and_falls_back_to_the_default() -> None:
    snapshot = SwarmSnapshot.from_json(json.dumps(document()))
    assert snapshot.rtt("s2", "s1") == snapshot.rtt("s1", "s2") == 12.0
    assert snapshot.rtt("s1", CLIENT) == 20.0
    assert snapshot.rtt("s2", CLIENT) == 40.0
    assert snapshot.rtt("s1", "s1") == 0.0


def test_json_round_trip_is_equal() -> None:
    snapshot = random_snapshot(np.random.default_rng(2), num_servers=9, num_blocks=12)
    assert SwarmSnapshot.from_json(snapshot.to_json()) == snapshot


def test_missing_blocks_are_maximal_spans() -> None:
    changed = document()
    changed["num_blocks"] = 12
    changed["servers"][0].update(start=2, end=5)
    changed["servers"][1].update(start=7, end=8)
    snapshot = SwarmSnapshot.from_json(json.dumps(changed))
    assert snapshot.missing_blocks() == ((0, 2), (5, 7), (8, 12))


def test_empty_swarm_misses_everything() -> None:
    changed = document() | {"servers": [], "rtt_ms": {}}
    assert SwarmSnapshot.from_json(json.dumps(changed)).missing_blocks() == ((0, 8),)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("version",), 2, "version 2"),
        (("version",), True, "version must be an integer"),
        (("num_blocks",), 0, "num_blocks"),
        (("num_blocks",), 10**9, "num_blocks"),
        (("num_blocks",), 8.0, "num_blocks must be an integer"),
        (("surprise",), 1, "unknown key 'surprise'"),
        (("hop_overhead_ms",), -1, "hop_overhead_ms"),
        (("default_rtt_ms",), "40", "default_rtt_ms must be a number"),
        (("default_rtt_ms",), 10**400, "default_rtt_ms"),
        (("activation_bytes_per_token",), True, "activation_bytes_per_token must be a number"),
        (("servers",), {}, "servers must be a list"),
        (("servers", 1), "s2", "servers[1] must be a JSON object"),
        (("servers", 1, "id"), "s1", "two servers have the id 's1'"),
        (("servers", 1, "id"), "client", "names the client"),
        (("servers", 1, "id"), "a\nb", "printable"),
        (("servers", 1, "id"), "", "printable"),
        (("servers", 1, "id"), 7, "id must be a string"),
        (("servers", 1, "end"), 9, "leaves the model"),
        (("servers", 1, "start"), -1, "leaves the model"),
        (("servers", 1, "start"), 8, "empty"),
        (("servers", 1, "start"), 1.5, "must be an integer"),
        (("servers", 1, "gpu"), "H100", "unknown key 'gpu'"),
        (("servers", 1, "decode_ms_per_block"), -0.1, "decode_ms_per_block"),
        (("servers", 1, "tokens_per_s_per_block"), 0, "tokens_per_s_per_block"),
        (("servers", 1, "network_bytes_per_s"), 0, "network_bytes_per_s"),
        (("servers", 1, "free_cache_tokens"), -1, "free_cache_tokens"),
        (("servers", 1, "reputation"), None, "reputation must be a number"),
        (("rtt_ms",), [], "rtt_ms"),
        (("rtt_ms", "s1"), 5, "rtt_ms"),
        (("rtt_ms", "s9"), {}, "'s9', which is no server"),
        (("rtt_ms", "s1", "s9"), 1.0, "'s9', which is no server"),
        (("rtt_ms", "s1", "s2"), -1.0, "'s1' and 's2'"),
        (("rtt_ms", "s2"), {"s1": 13.0}, "given twice"),
        (("rtt_ms", "s1", "s1"), 3.0, "to itself"),
    ],
)
def test_refuses_bad_values(path: tuple[Any, ...], value: object, says: str) -> None:
    changed = document()
    target = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        SwarmSnapshot.from_json(json.dumps(changed))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["version", "num_blocks", "default_rtt_ms", "servers"])
def test_refuses_a_missing_key(key: str) -> None:
    changed = document()
    del changed[key]
    with pytest.raises(ConfigError, match=f"key '{key}' is missing"):
        SwarmSnapshot.from_json(json.dumps(changed))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{",
        "[" * 100_000,
        '{"version": 1, "version": 1}',
        '{"hop_overhead_ms": NaN}',
        '{"hop_overhead_ms": -Infinity}',
        '{"num_blocks": ' + "9" * 5000 + "}",
    ],
)
def test_refuses_what_is_no_snapshot(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SwarmSnapshot.from_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_numbers_too_large_for_a_float_are_refused() -> None:
    text = json.dumps(document()).replace('"hop_overhead_ms": 2.0', '"hop_overhead_ms": 1e999')
    with pytest.raises(ConfigError, match="hop_overhead_ms"):
        SwarmSnapshot.from_json(text)


def test_same_rtt_given_in_both_directions_is_accepted() -> None:
    changed = document()
    changed["rtt_ms"]["s2"] = {"s1": 12.0}
    assert SwarmSnapshot.from_json(json.dumps(changed)).rtt("s1", "s2") == 12.0


def test_huge_file_is_refused_without_being_parsed(tmp_path: Path) -> None:
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(ConfigError, match=f"{MAX_SNAPSHOT_BYTES // 2**20} MiB"):
        SwarmSnapshot.load(huge)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        SwarmSnapshot.load(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot read"):
        SwarmSnapshot.load(tmp_path)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="UTF-8"):
        SwarmSnapshot.load(binary)


def test_server_point_checks_itself_outside_files_too() -> None:
    with pytest.raises(ConfigError, match="decode_ms_per_block"):
        ServerPoint("s1", 0, 4, float("nan"), 100.0, 1e6, 10)
