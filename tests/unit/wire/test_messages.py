"""Control messages: strict, bounded, and silent about what a stranger wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planetserve.errors import (
    CacheExhausted,
    CapacityError,
    ConfigError,
    PlanetServeError,
    RemoteProtocolError,
    UnsupportedError,
    error_from_code,
)
from planetserve.wire.extensible import MAX_UNKNOWN_FIELDS
from planetserve.wire.frame import MAX_CONTROL_BYTES
from planetserve.wire.messages import (
    ErrorReply,
    Message,
    NextHop,
    OpenSession,
    Progress,
    PushHello,
    Rewire,
    SessionOpened,
    decode,
    error_reply,
    from_text,
    to_text,
)

PEER = "12D3KooWJ8iDoJ7GxGTzhbPVFMQnbSq8VjLnDpvhvPhUzkRvEQXA"
KEY = to_text(bytes(range(32)))
SIGNATURE = to_text(bytes(range(64)))
OPEN = OpenSession(
    model="demo-3f2a",
    fingerprint="f" * 16,
    dtype="float32",
    start=0,
    end=4,
    num_rows=1,
    max_length=128,
    edge=0,
    epoch=0,
    previous="client",
    next=NextHop(
        peer_id=PEER, edge=1, fresh=True, addresses=[f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"], end=8
    ),
    first_step=0,
    offer=KEY,
)
NEXT = {"peer_id": PEER, "edge": 1, "fresh": True, "end": 8, "addresses": []}
MESSAGES: list[Message] = [
    OPEN,
    OPEN.model_copy(update={"next": None}),
    SessionOpened(
        max_chunk_tokens=64, chunkable=True, free_cache_tokens=0, answer=KEY, signature=SIGNATURE
    ),
    PushHello(client=PEER, edge=1, epoch=0),
    Rewire(epoch=3, previous=PEER, next=OPEN.next, first_step=7, max_chunk_tokens=64),
    Progress(frames_received=2, frames_sent=1, bytes_received=2**40, steps_running=1),
    ErrorReply(code="capacity", retry_after_s=1.5, blamed_peer=PEER),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


NAMES = st.sampled_from(["critical", "capabilities", "later", "later_2"])


def changed(message: Message, /, **changes: object) -> bytes:
    return json.dumps({**json.loads(message.encode()), **changes}).encode()


@pytest.mark.parametrize("message", MESSAGES)
def test_round_trip(message: Message) -> None:
    encoded = message.encode()
    assert len(encoded) < MAX_CONTROL_BYTES
    assert decode(type(message), encoded) == message
    assert decode(type(message), memoryview(bytearray(encoded))) == message


UNKNOWN = {f"later_{number}": {"a": [1, "\x1b[31m"]} for number in range(MAX_UNKNOWN_FIELDS)}


@pytest.mark.parametrize("message", MESSAGES)
def test_fields_of_later_versions_are_ignored(message: Message) -> None:
    found = decode(type(message), changed(message, **UNKNOWN))
    assert found == message
    assert found.encode() == message.encode()


def test_fields_of_later_versions_are_ignored_inside_a_field() -> None:
    assert decode(OpenSession, changed(OPEN, next={**NEXT, "later": 1})).next is not None


@pytest.mark.parametrize("message", MESSAGES)
def test_more_unknown_fields_than_a_message_may_have(message: Message) -> None:
    with pytest.raises(RemoteProtocolError, match=r"bad fields \(unknown\)$"):
        decode(type(message), changed(message, **UNKNOWN, one_more=0))


@pytest.mark.parametrize("name", ["\x1b[31m\nforged log line", "", "Later", "1st", "a" * 33, "a\n"])
@pytest.mark.parametrize("message", MESSAGES)
def test_an_unknown_name_that_is_none_is_refused_and_not_repeated(
    message: Message, name: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=r"bad fields \(unknown\)$"):
        decode(type(message), changed(message, **{name: 1}))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_critical_field_must_be_known(message: Message) -> None:
    known = next(iter(type(message).model_fields))
    assert decode(type(message), changed(message, critical=[known], later=1)) == message
    with pytest.raises(UnsupportedError, match=f"^{type(message).__name__}: later is unknown here"):
        decode(type(message), changed(message, critical=[known, "later"], later=1))


def test_a_critical_field_inside_a_field_must_be_known() -> None:
    with pytest.raises(UnsupportedError, match="^NextHop: later is unknown here"):
        decode(OpenSession, changed(OPEN, next={**NEXT, "later": 1, "critical": ["later"]}))


@pytest.mark.parametrize(
    "critical", [None, "later", {"later": 1}, [1], ["\x1b[2J"], ["a"] * 17, [["a"]]]
)
def test_a_list_of_critical_fields_that_is_none(critical: object) -> None:
    with pytest.raises(RemoteProtocolError, match=r"bad fields \(unknown\)$"):
        decode(PushHello, changed(MESSAGES[3], critical=critical))


def test_capabilities_are_named_in_open_only_when_there_are_some() -> None:
    """Servers from before them refuse the field."""
    assert b"capabilities" not in OPEN.encode()
    using = OPEN.model_copy(update={"capabilities": ["one", "two"]})
    assert decode(OpenSession, using.encode()) == using


@pytest.mark.parametrize("message", MESSAGES)
def test_every_required_field_is_required(message: Message) -> None:
    full = json.loads(message.encode())
    for name, field in type(message).model_fields.items():
        if field.is_required():
            rest = {key: value for key, value in full.items() if key != name}
            with pytest.raises(RemoteProtocolError, match=f"bad fields {name}$"):
                decode(type(message), json.dumps(rest).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "x" * 257),
        ("model", 5),
        ("dtype", "float64"),
        ("start", -1),
        ("start", "0"),
        ("start", 0.0),
        ("start", True),
        ("end", 65536),
        ("num_rows", 0),
        ("num_rows", 1025),
        ("max_length", 0),
        ("max_length", 2**24 + 1),
        ("edge", 1024),
        ("epoch", 2**31 + 1),
        ("previous", ""),
        ("previous", "x" * 129),
        ("offer", KEY[:-4]),
        ("offer", KEY.replace("=", "A")),
        ("offer", KEY + "\n"),
        ("offer", "\u00e9" * 43 + "="),
        ("next", {"peer_id": PEER}),
        ("next", {**NEXT, "addresses": ["a"] * 17}),
        ("next", {**NEXT, "addresses": ["a" * 257]}),
        ("next", {**NEXT, "end": 65536}),
        ("next", {**NEXT, "edge": 1024}),
        ("next", {**NEXT, "fresh": 1}),
        ("next", {**NEXT, "More": 1}),
        ("capabilities", ["Upper"]),
        ("capabilities", ["a"] * 17),
        ("capabilities", "one"),
    ],
)
def test_fields_are_bounded_and_nothing_is_coerced(field: str, value: object) -> None:
    with pytest.raises(RemoteProtocolError, match=f"OpenSession: bad fields {field}$"):
        decode(OpenSession, changed(OPEN, **{field: value}))


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=64, max_size=64))
def test_keys_and_signatures_travel_as_text(key: bytes, signature: bytes) -> None:
    message = SessionOpened(
        max_chunk_tokens=1, chunkable=True, free_cache_tokens=0,
        answer=to_text(key), signature=to_text(signature),
    )  # fmt: skip
    found = decode(SessionOpened, message.encode())
    assert (from_text(found.answer), from_text(found.signature)) == (key, signature)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b'{"edge": 1} trailing',
        b"[" * MAX_CONTROL_BYTES,
        b'{"a":' * (MAX_CONTROL_BYTES // 5),
        b"9" * MAX_CONTROL_BYTES,
    ],
)
def test_bytes_that_are_not_json(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="PushHello: not JSON"):
        decode(PushHello, payload)


@pytest.mark.parametrize("payload", [b"null", b"[]", b"1", b'"edge"', b"NaN"])
def test_json_that_is_not_an_object(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="PushHello: bad fields"):
        decode(PushHello, payload)


def decode_hostile(cls: type[Message], payload: bytes) -> None:
    """Decode; a message must survive a round trip, a refusal must be fit for a log."""
    complaint = ""
    try:
        found = decode(cls, payload)
    except RemoteProtocolError as error:
        complaint = str(error)
    else:
        assert decode(cls, found.encode()) == found
    assert not complaint or complaint.isprintable()
    assert len(complaint) < 300


@given(st.sampled_from(MESSAGES).map(type), JSON)
def test_any_json_is_a_message_or_a_protocol_error(cls: type[Message], value: object) -> None:
    decode_hostile(cls, json.dumps(value).encode())


@given(st.data())
def test_one_strange_value_is_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(MESSAGES))
    name = data.draw(st.sampled_from(sorted(type(message).model_fields)))
    decode_hostile(type(message), changed(message, **{name: data.draw(JSON)}))


@given(st.sampled_from(MESSAGES), st.dictionaries(st.text(max_size=8) | NAMES, JSON))
def test_any_unknown_fields_are_ignored_or_a_protocol_error(
    message: Message, fields: dict[str, object]
) -> None:
    decode_hostile(type(message), json.dumps(fields | json.loads(message.encode())).encode())


def test_an_error_has_no_text() -> None:
    payload = json.dumps({"code": "remote", "message": "from a stranger"}).encode()
    assert b"stranger" not in decode(ErrorReply, payload).encode()
    assert "stranger" not in decode(ErrorReply, payload).message


@pytest.mark.parametrize("value", [-1, 3601, "1"])
def test_retry_after_is_bounded(value: object) -> None:
    payload = json.dumps({"code": "capacity", "retry_after_s": value}).encode()
    with pytest.raises(RemoteProtocolError, match="bad fields retry_after_s"):
        decode(ErrorReply, payload)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_retry_after_is_a_number(number: str) -> None:
    payload = f'{{"code": "capacity", "retry_after_s": {number}}}'.encode()
    with pytest.raises(RemoteProtocolError, match="bad fields retry_after_s"):
        decode(ErrorReply, payload)


def test_an_error_crosses_with_its_code_and_waiting_time() -> None:
    reply = decode(ErrorReply, error_reply(CacheExhausted("10.0.0.7:22", 2.5), PEER).encode())
    rebuilt = error_from_code(reply.code, reply.message, reply.retry_after_s)
    assert type(rebuilt) is CacheExhausted
    assert (rebuilt.retry_after_s, reply.blamed_peer) == (2.5, PEER)
    assert "KV cache" in str(rebuilt)


@given(st.text(max_size=2000), st.floats(0, 1e9))
def test_any_error_of_ours_makes_a_reply_that_a_peer_accepts(text: str, wait_s: float) -> None:
    errors: list[PlanetServeError] = [ConfigError(text), CapacityError(text, wait_s)]
    for error in errors:
        reply = error_reply(error)
        assert decode(ErrorReply, reply.encode()) == reply


def _all_codes(kind: type[PlanetServeError] = PlanetServeError) -> set[str]:
    return {kind.code}.union(*map(_all_codes, kind.__subclasses__()))


def test_what_crosses_is_no_text_whatever_the_error() -> None:
    for code in _all_codes():
        error = error_from_code(code, "a secret")
        assert b"secret" not in error_reply(error).encode()
        assert ErrorReply(code=code).message
