"""Directory records: what they say, how they are signed, where in the DHT they belong.

A record is an envelope, strict JSON `{"v": 1, "body": "<json text>", "sig": "<base64>"}`. The
signature covers the DHT key and the body, and is checked against the peer id in the body alone. A
record is admitted only under the one key that follows from its body and under its owner's peer id
as subkey, so nobody can write for another, or anything else into the DHT. Every field is bounded,
so is the envelope (4 KB), and a record ends at most ten minutes after it was made.

A body may have fields, and be of a kind, that this node does not know: it keeps and passes on such
records, and ignores what it does not understand. The envelope may not: nobody has signed it.

Pure: bytes, numbers and a clock in, values out. `dht/operations.py` applies this to all that comes
from other nodes, `directory.py` reads and writes records through it.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
from collections import Counter, OrderedDict
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import override

from planetserve.clock import Clock
from planetserve.config import MAX_RECORD_LIFETIME_S
from planetserve.crypto.identity import SIGNATURE_BYTES, Identity, verify
from planetserve.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from planetserve.types import BlockSpan, DtypeName, PeerId, ServerInfo, ServerState
from planetserve.wire.extensible import Extensible, FieldName, Names

MAX_RECORD_BYTES = 4096
MAX_CLOCK_SKEW_S = 30.0
MAX_ADDRESSES = 8
MAX_NEXT_RTTS = 32
KEY_BYTES = 20
"""Size of a DHT key on the wire, in bytes."""
NUM_SHARDS = 8
"""Number of keys that share the servers of one model, so that one answer holds all of a key."""

_CONTEXT = b"directory record 1"
_NUM_REMEMBERED = 8192

# People will see these: no line breaks, escape sequences or other control characters.
_PRINTABLE = r"^\P{C}*$"
Text = Annotated[str, Field(max_length=256, pattern=_PRINTABLE)]
ShortText = Annotated[str, Field(max_length=64, pattern=_PRINTABLE)]
Prefix = Annotated[str, Field(min_length=1, max_length=256, pattern=_PRINTABLE)]
PeerText = Annotated[str, Field(min_length=46, max_length=64)]
Positive = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
UnixTime = Annotated[float, Field(gt=0, le=1e11, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Block = Annotated[int, Field(ge=0, le=65535)]
NumBlocks = Annotated[int, Field(ge=1, le=65536)]

Version = Annotated[int, Field(ge=1, le=255)]


class Envelope(BaseModel):
    """What is stored: the body's exact text and the owner's signature over it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    v: Annotated[int, Field(ge=1, le=1)]
    body: str
    sig: Annotated[str, Field(max_length=2 * SIGNATURE_BYTES)]


class Body(Extensible):
    """What every record says.

    `critical` names fields that whoever uses the record must understand; those who keep it or pass
    it on need not.
    """

    OMITTED: ClassVar[frozenset[str]] = frozenset({"critical"})

    peer_id: PeerText
    announced_at_s: UnixTime
    expires_at_s: UnixTime
    critical: Names = []

    @property
    def not_understood(self) -> tuple[str, ...]:
        """Critical fields that this node does not know."""
        return tuple(sorted(set(self.critical) - type(self).model_fields.keys()))

    def dht_key(self) -> bytes:
        """Where in the DHT this record belongs."""
        raise NotImplementedError


class OtherBody(Body):
    """A record of a kind that this node does not know. It keeps it for others."""

    kind: FieldName
    topic: Text

    @override
    def dht_key(self) -> bytes:
        topic = hashlib.sha256(self.topic.encode()).hexdigest()
        return f"planetserve/1/records/{self.kind}/{topic}".encode()


class ServerBody(Body):
    """A `ServerInfo`.

    `protocol_versions` are the oldest and the newest that it speaks.
    """

    OMITTED: ClassVar[frozenset[str]] = Body.OMITTED | {
        "protocol_versions", "capabilities", "manifest",
    }  # fmt: skip

    kind: Literal["server"] = "server"
    model: Prefix
    fingerprint: Text
    num_blocks: NumBlocks
    start: Block
    end: Block
    state: Literal["joining", "online", "draining", "offline"]
    dtype: DtypeName
    addresses: Annotated[list[Text], Field(max_length=MAX_ADDRESSES)]
    decode_ms_per_block: Positive
    alone_ms_per_block: Milliseconds
    tokens_per_s_per_block: Positive
    network_bytes_per_s: Positive
    hop_overhead_ms: Milliseconds
    free_cache_tokens: Count
    max_session_tokens: Count
    quant_type: ShortText
    version: ShortText
    public_name: ShortText
    next_rtt_ms: Annotated[dict[PeerText, Milliseconds], Field(max_length=MAX_NEXT_RTTS)]
    protocol_versions: Annotated[list[Version], Field(min_length=2, max_length=2)] = [1, 1]
    capabilities: Names = []
    manifest: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""

    @model_validator(mode="after")
    def _check_span(self) -> ServerBody:
        if not self.start < self.end <= self.num_blocks:
            raise ValueError("the span is not inside the model")
        if not all(text.endswith(f"/p2p/{self.peer_id}") for text in self.addresses):
            raise ValueError("an address leads to another peer")
        return self

    @override
    def dht_key(self) -> bytes:
        return server_key(self.model, shard_of(self.peer_id))

    def info(self) -> ServerInfo:
        """The value that the record stands for."""
        fields = self.model_dump(exclude={"kind", "start", "end", "expires_at_s", "critical"})
        fields |= {
            "span": BlockSpan(self.start, self.end),
            "state": ServerState(self.state),
            "addresses": tuple(self.addresses),
            "protocol_versions": tuple(self.protocol_versions),
            "capabilities": tuple(self.capabilities),
            "not_understood": self.not_understood,
        }
        return ServerInfo(**fields)


class ModelBody(Body):
    """That a model is served in this swarm; made by a few of its servers, not by all."""

    kind: Literal["model"] = "model"
    model: Prefix
    fingerprint: Text
    num_blocks: NumBlocks
    dtype: DtypeName

    @override
    def dht_key(self) -> bytes:
        return MODELS_KEY


MODELS_KEY = b"planetserve/1/models"


_KINDS: dict[str, type[Body]] = {"server": ServerBody, "model": ModelBody}


def shard_of(peer_id: PeerId) -> int:
    """Which of a model's keys holds the peer's record."""
    return hashlib.sha256(peer_id.encode()).digest()[0] % NUM_SHARDS


def server_key(model: str, shard: int) -> bytes:
    """DHT key of one shard of a model's servers."""
    name = hashlib.sha256(model.encode()).hexdigest()
    return f"planetserve/1/servers/{name}/{shard}".encode()


def key_digest(key: bytes) -> bytes:
    """A DHT key as it appears on the wire."""
    return hashlib.sha1(key, usedforsecurity=False).digest()


def server_body(info: ServerInfo, announced_at_s: float, expires_at_s: float) -> ServerBody:
    """The record body for `info`, cut to what a record may hold.

    Of the addresses the first are kept; of the round-trip times the shortest.

    Raises:
        ConfigError: a field is out of range; the message names it.
    """
    nearest = sorted(info.next_rtt_ms.items(), key=lambda item: item[1])[:MAX_NEXT_RTTS]
    fields = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    del fields["span"], fields["not_understood"]
    fields |= {
        "start": info.span.start,
        "end": info.span.end,
        "state": info.state.value,
        "addresses": list(info.addresses[:MAX_ADDRESSES]),
        "protocol_versions": list(info.protocol_versions),
        "capabilities": list(info.capabilities),
        "public_name": info.public_name[:64],
        "next_rtt_ms": {peer: round(ms, 2) for peer, ms in nearest},
        "announced_at_s": announced_at_s,
        "expires_at_s": expires_at_s,
    }
    try:
        return ServerBody.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"this server cannot be announced: {_fields(error)}") from None


def sign(identity: Identity, body: Body) -> bytes:
    """The envelope of a record.

    Raises:
        LocalProtocolError: it is over `MAX_RECORD_BYTES`, or the body names another peer.
    """
    if body.peer_id != identity.peer_id:
        raise LocalProtocolError("a record can only be signed by the peer it names")
    text = body.to_json()
    signature = identity.sign(_CONTEXT, _signed(body.dht_key(), text))
    sig = base64.b64encode(signature).decode()
    envelope = Envelope(v=1, body=text, sig=sig).model_dump_json().encode()
    if len(envelope) > MAX_RECORD_BYTES:
        raise LocalProtocolError(
            f"a directory record of {len(envelope)} bytes is over the limit of {MAX_RECORD_BYTES}"
        )
    return envelope


class RecordChecker:
    """Admits or refuses records, and counts refusals by reason in `rejected`.

    A record that passed once is remembered by its digest, so that seeing it again in another
    node's answer costs a hash instead of a signature check.
    """

    def __init__(self, clock: Clock):
        self.rejected: Counter[str] = Counter()
        self._clock = clock
        self._passed: OrderedDict[bytes, Body] = OrderedDict()

    def check(self, key: bytes, owner: PeerId, payload: bytes, expires_at_s: float) -> Body:
        """Parse and verify a record that was found, or is to be stored.

        A record that has ended already passes: answers of other nodes may hold one by a moment.

        Args:
            key: digest of the DHT key it stands under.
            owner: its subkey.
            payload: the envelope.
            expires_at_s: when the DHT drops it.

        Raises:
            RemoteProtocolError: refused; the message is the reason, one or two words.
        """
        try:
            return self._check(key, owner, payload, expires_at_s)
        except RemoteProtocolError as error:
            self.rejected[str(error)] += 1
            raise

    def _check(self, key: bytes, owner: PeerId, payload: bytes, expires_at_s: float) -> Body:
        if len(payload) > MAX_RECORD_BYTES:
            raise RemoteProtocolError("oversized")
        if len(key) != KEY_BYTES:
            raise RemoteProtocolError("wrong key")
        digest = hashlib.sha256(key + payload).digest()
        body = self._passed.get(digest)
        if body is None:
            body = _open(key, payload)
            self._passed[digest] = body
            if len(self._passed) > _NUM_REMEMBERED:
                self._passed.popitem(last=False)
        if body.peer_id != owner:
            raise RemoteProtocolError("wrong owner")
        if body.expires_at_s != expires_at_s:
            raise RemoteProtocolError("altered expiry")
        now = self._clock.unix()
        latest = min(body.announced_at_s, now) + MAX_RECORD_LIFETIME_S + MAX_CLOCK_SKEW_S
        if body.announced_at_s > now + MAX_CLOCK_SKEW_S or not body.expires_at_s <= latest:
            raise RemoteProtocolError("far future")
        return body


def _open(key: bytes, payload: bytes) -> Body:
    try:
        envelope = Envelope.model_validate_json(payload)
        value = json.loads(envelope.body)
        kind = value.get("kind") if isinstance(value, dict) else None
        cls: type[Body] = _KINDS.get(kind, OtherBody) if isinstance(kind, str) else OtherBody
        body = cls.model_validate(value)
    except (ValueError, RecursionError):
        raise RemoteProtocolError("malformed") from None
    if key_digest(body.dht_key()) != key:
        raise RemoteProtocolError("wrong key")
    try:
        signature = base64.b64decode(envelope.sig, validate=True)
    except binascii.Error:
        raise RemoteProtocolError("malformed") from None
    if not verify(body.peer_id, _CONTEXT, _signed(body.dht_key(), envelope.body), signature):
        raise RemoteProtocolError("bad signature")
    return body


def _signed(key: bytes, text: str) -> bytes:
    return len(key).to_bytes(2, "big") + key + text.encode()


def _fields(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg']}" for item in error.errors()
    )[:300]
