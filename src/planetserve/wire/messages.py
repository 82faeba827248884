"""Control messages: strict JSON in the payloads of all frames that are neither STEP nor EDGE_KEYS.

Every known field is bounded and nothing is coerced; a few unknown ones are ignored, unless the
sender lists them in `critical`, which any message and any object in one may have. `decode` is the
only way from bytes to a message.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import override

from planetserve.errors import (
    CapacityError,
    PlanetServeError,
    RemoteProtocolError,
    UnsupportedError,
)
from planetserve.types import DtypeName
from planetserve.wire.extensible import Extensible, Names
from planetserve.wire.frame import MAX_EDGE
from planetserve.wire.step import MAX_POSITION, MAX_ROWS

ShortText = Annotated[str, Field(max_length=256)]
PeerText = Annotated[str, Field(min_length=1, max_length=128)]
Block = Annotated[int, Field(ge=0, le=65535)]
Edge = Annotated[int, Field(ge=0, le=MAX_EDGE)]
InnerEdge = Annotated[int, Field(ge=1, le=MAX_EDGE)]
"""An edge between two hops: edge 0 comes from the client."""
Epoch = Annotated[int, Field(ge=0, le=2**31)]
StepNumber = Annotated[int, Field(ge=0, lt=2**32)]
KeyText = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]
"""32 bytes in base64 (RFC 4648, 4)."""
SignatureText = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{86}==$")]
"""64 bytes in base64."""

_TEXTS = {
    "unsupported": "the server does not know a part of the protocol that was asked for",
    "protocol": "a peer broke a rule of the protocol",
    "handshake": "a handshake was not completed",
    "decryption": "a sealed message could not be opened",
    "rekey": "a key is used up; a new session has fresh ones",
    "capacity": "the server is full or leaving the swarm",
    "cache_exhausted": "the server has no room in its KV cache for this session",
    "queue_full": "the server has as many sessions or steps, in all or of one client, as it takes",
    "model_mismatch": "the server serves another model or revision",
    "session": "a step does not fit its session",
    "session_length": "more tokens than the server allows in a session",
    "session_closed": "the session was closed",
    "session_expired": "the session was idle, or open, for longer than the server allows",
    "unreachable": "the next server cannot be reached",
    "stream_closed": "a neighbour has closed its stream",
    "timeout": "a neighbour has stopped sending",
}
_OTHER_TEXT = "the server failed to run the step"


_CRITICAL: TypeAdapter[list[str]] = TypeAdapter(Names)


class Message(Extensible):
    """Base of all control messages."""

    def encode(self) -> bytes:
        """Compact JSON."""
        return self.to_json().encode()

    @classmethod
    @override
    def check_unknown(cls, fields: Mapping[str, object]) -> None:
        super().check_unknown(fields)
        critical = _CRITICAL.validate_python(fields.get("critical", []), strict=True)
        unknown = sorted(set(critical) - cls.model_fields.keys())
        if unknown:
            raise UnsupportedError(f"{cls.__name__}: {unknown[0]} is unknown here, and critical")


class NextHop(Message):
    """Where a hop pushes its outputs, and up to which block the next hop runs.

    `edge` is the edge that enters the next hop. `fresh` says that its KV cache begins empty: what
    fills this hop's has to be passed on to it too.
    """

    peer_id: PeerText
    edge: InnerEdge
    fresh: bool
    end: Block
    addresses: Annotated[list[ShortText], Field(max_length=16)]


class OpenSession(Message):
    """Client -> hop: hold rows of KV cache for blocks `[start, end)` and join the ring.

    `previous` is the peer whose frames this hop accepts ("client" for the first hop), `next` the
    peer it pushes to (None for the last hop, which answers the client on this stream). `edge` is
    the edge that enters this hop and names the hop in the session. `first_step` is the number of
    the first step that it answers or passes on; one with FLAG_REPLAY may come before. `offer`
    begins the handshake (`crypto/handshake.py`). `capabilities` are those that the session uses;
    the hop's signature covers them, as it does the whole message.
    """

    OMITTED: ClassVar[frozenset[str]] = frozenset({"capabilities"})

    model: ShortText
    fingerprint: ShortText
    dtype: DtypeName
    start: Block
    end: Block
    num_rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    max_length: Annotated[int, Field(ge=1, le=MAX_POSITION)]
    edge: Edge
    epoch: Epoch
    previous: PeerText
    next: NextHop | None
    first_step: StepNumber
    offer: KeyText
    capabilities: Names = []


class SessionOpened(Message):
    """Hop -> client: the session is admitted. Chunks of a step hold at most `max_chunk_tokens`.

    `answer` and `signature` end the handshake.
    """

    max_chunk_tokens: Annotated[int, Field(ge=1, le=MAX_POSITION)]
    chunkable: bool
    free_cache_tokens: Annotated[int, Field(ge=0)]
    answer: KeyText
    signature: SignatureText


class PushHello(Message):
    """Hop -> next hop: this stream carries the named edge of the session that `client` opened."""

    client: PeerText
    edge: InnerEdge
    epoch: Epoch


class Rewire(Message):
    """Client -> hop: a neighbour is replaced; the secrets of the new edge follow in EDGE_KEYS.

    `previous` and `next` are as in `OpenSession`, None for what stays as it is. `epoch` is that of
    the edges that change. The hop sends `next` what it has sent on its edge so far, in frames of at
    most `max_chunk_tokens`: what belongs to steps before `first_step` with FLAG_REPLAY, the rest as
    it was.
    """

    epoch: Epoch
    previous: PeerText | None
    next: NextHop | None
    first_step: StepNumber
    max_chunk_tokens: Annotated[int, Field(ge=1, le=MAX_POSITION)]


class Progress(Message):
    """Hop -> client: how far a hop has come, since its neighbours are those of now.

    Frames count when they have been opened and when they have been sealed; `bytes_received` count
    what has come of a frame that is still under way, too. `steps_running` are in the engine.
    """

    frames_received: Annotated[int, Field(ge=0)]
    frames_sent: Annotated[int, Field(ge=0)]
    bytes_received: Annotated[int, Field(ge=0)]
    steps_running: Annotated[int, Field(ge=0)]


class ErrorReply(Message):
    """Hop -> client or upstream: why a session failed, or (NEXT_HOP_LOST) cannot go on as it is.

    Nothing that a person or an exception has worded travels: the receiver words the code itself.
    """

    code: Annotated[str, Field(max_length=32, pattern=r"^[a-z_]+$")]
    retry_after_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    blamed_peer: Annotated[str, Field(max_length=128)] = ""

    @property
    def message(self) -> str:
        """What the code says, for people."""
        return _TEXTS.get(self.code, _OTHER_TEXT)


M = TypeVar("M", bound=Message)


def decode(cls: type[M], payload: bytes | bytearray | memoryview) -> M:
    """Parse a control payload.

    Raises:
        UnsupportedError: the sender says that a field is critical which `cls` does not have.
        RemoteProtocolError: not JSON, too deep, a field of `cls` is missing or wrong, or too much
            besides.
    """
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"{cls.__name__}: not JSON") from error
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        # A name that the peer made up must not reach logs.
        named = {str(item["loc"][0]) if item["loc"] else "" for item in error.errors()}
        fields = sorted(named & cls.model_fields.keys()) or ["(unknown)"]
        raise RemoteProtocolError(f"{cls.__name__}: bad fields {', '.join(fields)}") from error


def to_text(data: bytes) -> str:
    """Bytes as a `KeyText` or `SignatureText`."""
    return base64.b64encode(data).decode("ascii")


def from_text(text: str) -> bytes:
    """The bytes of a `KeyText` or `SignatureText` that has passed its pattern."""
    return base64.b64decode(text)


def error_reply(error: PlanetServeError, blamed_peer: str = "") -> ErrorReply:
    """What a peer may learn about `error`: its code and when to come back."""
    retry_after_s = error.retry_after_s if isinstance(error, CapacityError) else 0.0
    return ErrorReply(
        code=error.code, retry_after_s=min(retry_after_s, 3600.0), blamed_peer=blamed_peer
    )
