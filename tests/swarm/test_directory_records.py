"""Directory records without a network: what is signed, what is admitted, what is refused."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarm_helpers import make_info

from planetserve.crypto.identity import Identity
from planetserve.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from planetserve.swarm import records
from planetserve.swarm.records import RecordChecker
from planetserve.types import BlockSpan, ServerInfo, ServerState

NOW = 1_700_000_000.0
OWNER = Identity.generate()
INFO = make_info(
    OWNER, next_rtt_ms={Identity.generate().peer_id: 1.25}, public_name='Zoë\'s "box"', version="1"
)


class StoppedClock:
    """It is always `NOW`, or what a test says."""

    def __init__(self, now: float = NOW):
        self.now = now

    def unix(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def body_of(info: ServerInfo = INFO, ttl_s: float = 60.0, now: float = NOW) -> records.ServerBody:
    return records.server_body(info, now, now + ttl_s)


def check(checker: RecordChecker, envelope: bytes, **changes: Any) -> records.Body:
    body = body_of()
    arguments = {
        "key": records.key_digest(body.dht_key()),
        "owner": OWNER.peer_id,
        "expires_at_s": body.expires_at_s,
    }
    return checker.check(payload=envelope, **{**arguments, **changes})


def resigned(identity: Identity = OWNER, **fields: Any) -> bytes:
    """An envelope with changed fields and a good signature of `identity`."""
    text = json.dumps({**json.loads(body_of().model_dump_json()), **fields})
    return enveloped(text, identity)


def enveloped(text: str, identity: Identity = OWNER) -> bytes:
    key = body_of().dht_key()
    signature = identity.sign(records._CONTEXT, records._signed(key, text))
    return json.dumps({"v": 1, "body": text, "sig": base64.b64encode(signature).decode()}).encode()


def test_a_server_record_keeps_every_field() -> None:
    body = check(RecordChecker(StoppedClock()), records.sign(OWNER, body_of()))
    assert isinstance(body, records.ServerBody)
    assert body.info() == dataclasses.replace(INFO, announced_at_s=NOW)


def test_every_field_of_server_info_is_in_the_record() -> None:
    fields = {field.name for field in dataclasses.fields(ServerInfo)} - {"span", "not_understood"}
    assert fields <= set(records.ServerBody.model_fields)


def test_too_much_is_cut_to_what_a_record_holds() -> None:
    rtts = {Identity.generate().peer_id: float(number) for number in range(40)}
    suffix = f"/p2p/{OWNER.peer_id}"
    addresses = tuple(f"/ip6/2001:db8:0:0:0:0:0:{n:x}/tcp/31337{suffix}" for n in range(20))
    body = body_of(
        dataclasses.replace(INFO, next_rtt_ms=rtts, addresses=addresses, manifest="a" * 64)
    )
    assert len(records.sign(OWNER, body)) <= records.MAX_RECORD_BYTES
    assert sorted(body.next_rtt_ms.values()) == [float(number) for number in range(32)]
    assert body.addresses == list(addresses[:8])


@pytest.mark.parametrize(
    "fields",
    [
        {"decode_ms_per_block": math.nan},
        {"decode_ms_per_block": -1.0},
        {"tokens_per_s_per_block": math.inf},
        {"network_bytes_per_s": 0.0},
        {"free_cache_tokens": -1},
        {"span": BlockSpan(4, 9)},
        {"dtype": "int8"},
        {"model": ""},
        {"model": "m" * 300},
        {"addresses": (f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}",)},
    ],
)
def test_a_server_cannot_announce_nonsense_of_itself(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}|record"):
        body_of(dataclasses.replace(INFO, **fields))


def test_nobody_signs_for_another() -> None:
    with pytest.raises(LocalProtocolError):
        records.sign(Identity.generate(), body_of())


STRANGER = Identity.generate()
GOOD = records.sign(OWNER, body_of())
OTHER_KEY = records.key_digest(records.server_key("other", 0))

REFUSED: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "not json": ("malformed", b"\x00\x01", {}),
    "deep json": ("malformed", b"[" * 4000, {}),
    "deep body": ("malformed", enveloped("[" * 1500), {}),
    "unknown version": ("malformed", GOOD.replace(b'"v":1', b'"v":2'), {}),
    "version of another type": ("malformed", GOOD.replace(b'"v":1', b'"v":true'), {}),
    "extra envelope field": ("malformed", GOOD[:-1] + b',"x":1}', {}),
    "unknown fields, too many": (
        "malformed",
        resigned(**{f"later_{number}": 0 for number in range(33)}),
        {},
    ),
    "unknown field without a proper name": ("malformed", resigned(**{"\x1b[2J": 1}), {}),
    "kind without a topic": ("malformed", resigned(kind="verdict"), {}),
    "kind without a proper name": ("malformed", resigned(kind="a/b", topic="t"), {}),
    "kind that is no text": ("malformed", resigned(kind=["server"]), {}),
    "unknown kind under a server's key": ("wrong key", resigned(kind="verdict", topic="t"), {}),
    "critical is no list": ("malformed", resigned(critical="model"), {}),
    "one version": ("malformed", resigned(protocol_versions=[1]), {}),
    "version 0": ("malformed", resigned(protocol_versions=[0, 1]), {}),
    "huge number": ("malformed", resigned(decode_ms_per_block=10**400), {}),
    "half a character": ("malformed", resigned(public_name="\ud800"), {}),
    "string for a number": ("malformed", resigned(free_cache_tokens="1"), {}),
    "terminal escape sequence": ("malformed", resigned(public_name="\x1b[2Jhello"), {}),
    "line break in a name": ("malformed", resigned(fingerprint="f" * 8 + "\n"), {}),
    "NaN": ("malformed", resigned(decode_ms_per_block=math.nan), {}),
    "infinite": ("malformed", resigned(tokens_per_s_per_block=math.inf), {}),
    "negative": ("malformed", resigned(network_bytes_per_s=-1.0), {}),
    "span past the end": ("malformed", resigned(end=9), {}),
    "empty span": ("malformed", resigned(start=4), {}),
    "unknown state": ("malformed", resigned(state="rich"), {}),
    "foreign address": (
        "malformed",
        resigned(addresses=[f"/ip4/1.2.3.4/tcp/1/p2p/{STRANGER.peer_id}"]),
        {},
    ),
    "no manifest's hash": ("malformed", resigned(manifest="A" * 64), {}),
    "too many addresses": ("malformed", resigned(addresses=[INFO.addresses[0]] * 9), {}),
    "too many round-trip times": (
        "malformed",
        resigned(next_rtt_ms={f"{n:046}": 1.0 for n in range(33)}, addresses=[]),
        {},
    ),
    "oversized": ("oversized", GOOD + b" " * 4096, {}),
    "signature of another": ("bad signature", resigned(STRANGER), {}),
    "body changed after signing": ("bad signature", GOOD.replace(b"4096", b"4097"), {}),
    "signature is not base64": (
        "malformed",
        json.dumps({**json.loads(GOOD), "sig": "%%%%"}).encode(),
        {},
    ),
    "under another's name": ("wrong owner", GOOD, {"owner": STRANGER.peer_id}),
    "under another key": ("wrong key", GOOD, {"key": OTHER_KEY}),
    "kept longer than signed": ("altered expiry", GOOD, {"expires_at_s": NOW + 600}),
    "far expiry": (
        "far future",
        resigned(expires_at_s=NOW + 1e9),
        {"expires_at_s": NOW + 1e9},
    ),
    "made in the future": ("far future", resigned(announced_at_s=NOW + 3600), {}),
    "lives too long": (
        "far future",
        resigned(announced_at_s=NOW - 3600, expires_at_s=NOW + 60),
        {},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    reason, envelope, changes = REFUSED[name]
    checker = RecordChecker(StoppedClock())
    with pytest.raises(RemoteProtocolError, match=reason):
        check(checker, envelope, **changes)
    assert checker.rejected == {reason: 1}


def test_a_record_seen_before_is_still_checked_for_owner_key_and_time() -> None:
    clock = StoppedClock()
    checker = RecordChecker(clock)
    check(checker, GOOD)
    for changes in ({"owner": STRANGER.peer_id}, {"key": OTHER_KEY}, {"expires_at_s": NOW + 61}):
        with pytest.raises(RemoteProtocolError):
            check(checker, GOOD, **changes)
    clock.now = NOW - 3600
    with pytest.raises(RemoteProtocolError, match="far future"):
        check(checker, GOOD)


@pytest.mark.parametrize("moved", [-20, -1, 1, 20])
def test_a_record_seen_before_is_not_known_with_its_bytes_split_elsewhere(moved: int) -> None:
    """Where the key ends and the envelope begins is the sender's choice."""
    checker = RecordChecker(StoppedClock())
    check(checker, GOOD)
    key = records.key_digest(body_of().dht_key())
    split = len(key) + moved
    with pytest.raises(RemoteProtocolError, match="wrong key"):
        check(checker, (key + GOOD)[split:], key=(key + GOOD)[:split])


def test_a_record_that_just_ended_still_passes() -> None:
    """Another node's answer may hold one by a moment, and must not be refused for it."""
    assert check(RecordChecker(StoppedClock(NOW + 61)), GOOD).peer_id == OWNER.peer_id


def test_model_records_belong_in_the_index() -> None:
    body = records.ModelBody(
        peer_id=OWNER.peer_id, model="tiny", fingerprint="f", num_blocks=8, dtype="float32",
        announced_at_s=NOW, expires_at_s=NOW + 60,
    )  # fmt: skip
    envelope = records.sign(OWNER, body)
    checker = RecordChecker(StoppedClock())
    assert check(checker, envelope, key=records.key_digest(records.MODELS_KEY)) == body
    with pytest.raises(RemoteProtocolError, match="wrong key"):
        check(checker, envelope)


def test_a_server_says_what_it_speaks_unless_that_is_what_all_do() -> None:
    """Nodes from before the fields refuse records that have them."""
    names = {"protocol_versions", "capabilities", "critical", "manifest"}
    assert not names & json.loads(body_of().to_json()).keys()
    info = dataclasses.replace(
        INFO, protocol_versions=(1, 3), capabilities=("one", "two"), manifest="a" * 64
    )
    body = check(RecordChecker(StoppedClock()), records.sign(OWNER, body_of(info)))
    assert isinstance(body, records.ServerBody)
    assert body.info() == dataclasses.replace(info, announced_at_s=NOW)


def test_fields_of_later_versions_are_ignored_and_critical_ones_named() -> None:
    later = {"later": {"a": [1, 2]}, "price": 5}
    body = check(RecordChecker(StoppedClock()), resigned(**later))
    assert isinstance(body, records.ServerBody)
    assert body.info() == dataclasses.replace(INFO, announced_at_s=NOW)
    critical = check(RecordChecker(StoppedClock()), resigned(**later, critical=["start", "price"]))
    assert isinstance(critical, records.ServerBody)
    assert critical.info().not_understood == ("price",)


def test_records_of_a_later_kind_are_kept_under_the_key_that_follows_from_them() -> None:
    fields = {
        "peer_id": OWNER.peer_id, "announced_at_s": NOW, "expires_at_s": NOW + 60,
        "kind": "verdict", "topic": "chess", "moves": ["e4"], "critical": ["moves"],
    }  # fmt: skip
    topic = hashlib.sha256(b"chess").hexdigest()
    key = f"planetserve/1/records/verdict/{topic}".encode()
    text = json.dumps(fields)
    sig = base64.b64encode(OWNER.sign(records._CONTEXT, records._signed(key, text))).decode()
    envelope = json.dumps({"v": 1, "body": text, "sig": sig}).encode()
    checker = RecordChecker(StoppedClock())
    body = check(checker, envelope, key=records.key_digest(key))
    assert (type(body), body.peer_id) == (records.OtherBody, OWNER.peer_id)
    with pytest.raises(RemoteProtocolError, match="wrong owner"):
        check(checker, envelope, key=records.key_digest(key), owner=STRANGER.peer_id)
    forged = envelope.replace(b"e4", b"e5")
    with pytest.raises(RemoteProtocolError, match="bad signature"):
        check(checker, forged, key=records.key_digest(key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from([*records.ServerBody.model_fields, "topic", "later"])


@given(st.dictionaries(st.text(max_size=8) | FIELDS, JSON, max_size=3))
def test_any_body_is_a_record_or_refused(fields: dict[str, Any]) -> None:
    checker = RecordChecker(StoppedClock())
    with contextlib.suppress(RemoteProtocolError):
        check(checker, resigned(**fields))
    assert checker.rejected.total() <= 1


def test_servers_of_a_model_are_spread_over_all_shards() -> None:
    shards = {records.shard_of(Identity.generate().peer_id) for _ in range(200)}
    assert shards == set(range(records.NUM_SHARDS))


def test_all_states_can_be_announced() -> None:
    for state in ServerState:
        assert body_of(dataclasses.replace(INFO, state=state)).info().state is state
