"""Nodes of today in a session that was recorded with the code before the protocol could grow.

That code refuses every field that it does not know. A session of a later version is recorded with
`python tests/e2e/recorded_session.py FILE` at its last commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_session import NAMES, PEERS, SPANS, identity, record, replay

from planetserve.swarm.records import ModelBody, RecordChecker, ServerBody, key_digest
from planetserve.types import ServerInfo, ServerState
from planetserve.wire import protocols
from planetserve.wire.frame import HEADER_BYTES, FrameHeader, FrameType
from planetserve.wire.messages import OpenSession, decode

RECORDING: dict[str, Any] = json.loads(
    (Path(__file__).parent / "version_1_session.json").read_text(encoding="utf-8")
)


class _Then:
    """The time at which a record was stored."""

    def __init__(self, unix_s: float):
        self._unix_s = unix_s

    def unix(self) -> float:
        return self._unix_s

    def monotonic(self) -> float:
        return self._unix_s


def bodies() -> list[ServerBody | ModelBody]:
    """The recorded directory as today's code reads it."""
    found: list[Any] = [
        RecordChecker(_Then(item["stored_at_s"])).check(
            key_digest(item["key"].encode()), item["owner"], item["envelope"].encode(),
            item["expires_at_s"],
        )
        for item in RECORDING["records"]
    ]  # fmt: skip
    return found


def servers() -> dict[str, ServerInfo]:
    """What a client of today knows of the servers."""
    return {body.peer_id: body.info() for body in bodies() if isinstance(body, ServerBody)}


def test_the_recording_has_every_frame_of_a_session() -> None:
    sent = [bytes.fromhex(event[3]) for event in RECORDING["events"] if event[2] == "sent"]
    kinds = {FrameHeader.unpack(frame[:HEADER_BYTES]).type for frame in sent}
    assert kinds == {
        FrameType.OPEN, FrameType.OPENED, FrameType.EDGE_KEYS, FrameType.HELLO, FrameType.STEP,
        FrameType.STATUS, FrameType.REWIRE, FrameType.REWIRED, FrameType.CLOSE,
    }  # fmt: skip


def test_records_of_then_are_read() -> None:
    known = servers()
    assert {PEERS[name]: span for name, span in SPANS.items()} == {
        peer_id: info.span for peer_id, info in known.items()
    }
    for info in known.values():
        assert info.state is ServerState.ONLINE
        assert (info.protocol_versions, info.capabilities) == ((1, 1), ())
    assert sum(isinstance(body, ModelBody) for body in bodies()) == 3


def test_records_of_now_have_the_fields_of_then() -> None:
    now = record()["records"]
    for item, then in zip(now, RECORDING["records"], strict=True):
        envelope, old = json.loads(item["envelope"]), json.loads(then["envelope"])
        assert envelope.keys() == old.keys()
        assert json.loads(envelope["body"]).keys() == json.loads(old["body"]).keys()


@pytest.mark.parametrize(
    "real",
    [("client",), ("first",), ("last",), ("other last",), tuple(SPANS), NAMES[:2], NAMES],
    ids=", ".join,
)
def test_nodes_of_today_talk_with_those_of_then(real: tuple[str, ...]) -> None:
    replay(RECORDING, real, servers())


@pytest.mark.parametrize("real", [("client",), tuple(SPANS)], ids=", ".join)
def test_what_is_optional_is_not_used_with_nodes_of_then(
    real: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "CAPABILITIES", frozenset({"later"}))
    replay(RECORDING, real, servers())


def test_what_is_optional_is_used_where_both_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "CAPABILITIES", frozenset({"later", "latest"}))
    found = record()
    bodies = [json.loads(json.loads(item["envelope"])["body"]) for item in found["records"]]
    announced = [body["capabilities"] for body in bodies if body["kind"] == "server"]
    assert announced == [["later", "latest"]] * 3
    sent = [bytes.fromhex(event[3]) for event in found["events"] if event[2] == "sent"]
    opens = [
        decode(OpenSession, frame[HEADER_BYTES:])
        for frame in sent
        if FrameHeader.unpack(frame[:HEADER_BYTES]).type is FrameType.OPEN
    ]
    assert [message.capabilities for message in opens] == [["later", "latest"]] * 3


def test_keys_of_the_recording_are_those_of_the_names() -> None:
    assert {item["owner"] for item in RECORDING["records"]} == {
        identity(name).peer_id for name in SPANS
    }
