"""Every error that leaves a PlanetServe function: who is to blame, and whether a retry can help.

PlanetServeError                  blame     retryable
├── ConfigError                   LOCAL     no    flags, YAML, arguments: says what to change
│   └── ModelError                LOCAL     no    the model cannot be found, read or served
├── LocalProtocolError            LOCAL     no    we built a bad message
├── RemoteProtocolError           REMOTE    yes   the peer sent one; another may not
│   ├── UnsupportedError          REMOTE    yes   it needs what this node does not know
│   └── ReceiptError              REMOTE    yes   it has signed for other activations than passed
├── TransportError                UNKNOWN   yes
│   ├── PeerUnreachable           UNKNOWN   yes
│   ├── HopTimeout                UNKNOWN   yes
│   │   └── EdgeStalled           UNKNOWN   yes   two hops answer, but nothing passes between them
│   ├── StreamClosed              UNKNOWN   yes
│   └── ReceiptMissing            UNKNOWN   yes   a server has not signed for what it did
├── EdgeMismatch                  UNKNOWN   yes   two servers have signed for different activations
├── CryptoError                   UNKNOWN   no
│   ├── HandshakeFailed           REMOTE    yes   the peer did not prove who it is
│   ├── DecryptionFailed          REMOTE    yes   tampered, replayed, or sealed with another key
│   └── RekeyNeeded               LOCAL     yes   a key is used up; a new epoch has new ones
├── RemoteError                   REMOTE    yes   this server failed to run a step
├── PeerReportedError             REMOTE    yes   what a peer says of a session; decides nothing
├── NoChainAvailable              NOBODY    yes
│   ├── MissingBlocksError        NOBODY    yes
│   │   └── ModelMismatchError    NOBODY    no    another model or revision lives in this swarm
│   └── RefusedByServers          NOBODY    yes   all attempts ended with what servers reported
├── CapacityError                 NOBODY    yes
│   ├── CacheExhausted            NOBODY    yes   carries retry_after_s
│   └── QueueFull                 NOBODY    yes
└── SessionError                  LOCAL     no
    ├── SessionLengthError        LOCAL     no    more tokens than max_length
    ├── SessionClosed             LOCAL     no
    └── SessionExpired            NOBODY    yes   idle or old; its history can be sent again

A retry goes to another chain, without the peer at fault. The retry loop reads only `retryable`;
reputation reads only `blame`, so a client's own bug can never ban a server. `code` is what crosses
the network; messages never do unless they are built from numbers the peer already knows. At the
other side it is a `PeerReportedError`, whatever its code: a peer can report anything.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from typing_extensions import override

_MAX_REPORTED_CHARS = 160


def one_line(text: object, most_chars: int = 2000) -> str:
    """`text` for a terminal or a log: one line, control characters spelled out, not too long."""
    lines = (line.strip() for line in str(text).splitlines())
    line = printable(" ".join(line for line in lines if line))
    return line if len(line) <= most_chars else f"{line[:most_chars]} ..."


def printable(text: str) -> str:
    """`text` with characters spelled out that a terminal would obey, lines as they are."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text
    )


class Blame(enum.Enum):
    """Whose fault a failure is."""

    LOCAL = "local"
    REMOTE = "remote"
    UNKNOWN = "unknown"
    NOBODY = "nobody"


class PlanetServeError(Exception):
    """Base of all errors raised by this package."""

    blame = Blame.UNKNOWN
    retryable = False
    code = "internal"
    peer_id: str | None = None
    """The peer whose hop failed, when that is known; set by whoever noticed."""
    edge: tuple[str, str] | None = None
    """Instead of `peer_id`: peer ids of the sending and the receiving end of an edge, one of which
    is at fault, when it cannot be told which."""
    others: Sequence[PlanetServeError] = ()
    """What else failed in the same attempt."""

    @override
    def __str__(self) -> str:
        """The message as one line that is safe on a terminal, whoever's words are in it."""
        return one_line(super().__str__())


class ConfigError(PlanetServeError, ValueError):
    """A setting, flag or argument is wrong; the message says which and what to give instead."""

    blame = Blame.LOCAL
    code = "config"


class ModelError(ConfigError):
    """The model cannot be found, read, or served; the message says why and what to do."""

    code = "model"


class LocalProtocolError(PlanetServeError):
    """This process tried to send something the protocol forbids."""

    blame = Blame.LOCAL
    code = "local_protocol"


class RemoteProtocolError(PlanetServeError):
    """A peer sent something the protocol forbids."""

    blame = Blame.REMOTE
    retryable = True
    code = "protocol"


class UnsupportedError(RemoteProtocolError):
    """A peer speaks another version of the protocol, or needs a part of it unknown here."""

    code = "unsupported"


class ReceiptError(RemoteProtocolError):
    """A server has signed for something else than has passed between it and this client."""

    code = "receipt"


class TransportError(PlanetServeError):
    """The network failed in a way that does not tell whose fault it is."""

    blame = Blame.UNKNOWN
    retryable = True
    code = "transport"


class PeerUnreachable(TransportError):
    """No connection to the peer could be made."""

    code = "unreachable"


class HopTimeout(TransportError):
    """A peer did not answer within the step timeout."""

    code = "timeout"


class EdgeStalled(HopTimeout):
    """Both ends of an edge answer the client, yet nothing passes between them.

    Which of them is at fault cannot be told, so neither is blamed: `edge` is to be avoided.
    """

    code = "edge_stalled"
    epoch: int | None = None
    """Epoch of the edge, if one of its ends has said so."""


class StreamClosed(TransportError):
    """The stream ended before the answer came."""

    code = "stream_closed"


class ReceiptMissing(TransportError):
    """A server has not signed in time for what it has taken in and sent on."""

    code = "receipt_missing"


class EdgeMismatch(PlanetServeError):
    """The two ends of an edge have signed for different activations.

    Which of them lies cannot be told from that, so neither is blamed: `edge` is to be avoided.
    """

    blame = Blame.UNKNOWN
    retryable = True
    code = "edge_mismatch"


class CryptoError(PlanetServeError):
    """Something protected could not be opened, or may not be sealed."""

    code = "crypto"


class HandshakeFailed(CryptoError):
    """The peer did not prove its identity for this session. Another peer may."""

    blame = Blame.REMOTE
    retryable = True
    code = "handshake"


class DecryptionFailed(CryptoError):
    """A sealed message was refused. The text is always the same: why is nobody's business."""

    blame = Blame.REMOTE
    retryable = True
    code = "decryption"


class RekeyNeeded(CryptoError):
    """A key has protected as much as it may; the next epoch has a fresh one."""

    blame = Blame.LOCAL
    retryable = True
    code = "rekey"


class RemoteError(PlanetServeError):
    """A server failed to run a step."""

    blame = Blame.REMOTE
    retryable = True
    code = "remote"


class PeerReportedError(PlanetServeError):
    """A peer refused or ended a session.

    Its reason is data: it is shown as what the peer says, and decides neither whether to try again
    nor who is left out nor for how long. `retry_after_s` is a wish, which a client bounds.
    """

    blame = Blame.REMOTE
    retryable = True
    code = "peer_reported"

    def __init__(self, message: str, reported: str = "", retry_after_s: float = 0.0):
        super().__init__(message)
        self.reported = reported
        """The code and the text that the peer gave, printable and cut to size."""
        self.retry_after_s = retry_after_s

    @classmethod
    def of(
        cls, peer_id: str, code: str, message: str, retry_after_s: float = 0.0
    ) -> PeerReportedError:
        """What `peer_id` reports, in a line that says whose words these are."""
        text = one_line(f"{code}: {message}", _MAX_REPORTED_CHARS)
        return cls(f"server …{peer_id[-6:]} says: {text!r}", text, retry_after_s)


class NoChainAvailable(PlanetServeError):
    """No chain of servers covers the model for this request."""

    blame = Blame.NOBODY
    retryable = True
    code = "no_chain"


class MissingBlocksError(NoChainAvailable):
    """No live server holds some blocks. `missing` lists them as half-open spans `(start, end)`."""

    code = "missing_blocks"

    def __init__(self, message: str, missing: Sequence[tuple[int, int]] = ()):
        super().__init__(message)
        self.missing = tuple(missing)


class ModelMismatchError(MissingBlocksError):
    """The swarm serves another model, or another revision of this one."""

    retryable = False
    code = "model_mismatch"


class RefusedByServers(NoChainAvailable):
    """Every attempt ended with what a server reported; the message says which and what."""

    code = "refused"


class CapacityError(PlanetServeError):
    """A server is full; another one, or the same one later, may serve."""

    blame = Blame.NOBODY
    retryable = True
    code = "capacity"

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CacheExhausted(CapacityError):
    """Not enough free KV pages for the session; `retry_after_s` says when to ask again."""

    code = "cache_exhausted"


class QueueFull(CapacityError):
    """A bounded queue is full."""

    code = "queue_full"


class SessionError(PlanetServeError):
    """A step does not fit the session it names."""

    blame = Blame.LOCAL
    code = "session"


class SessionLengthError(SessionError):
    """The step would pass the session's `max_length`."""

    code = "session_length"


class SessionClosed(SessionError):
    """The session or its model has been closed."""

    code = "session_closed"


class SessionExpired(SessionError):
    """A server ended a session that was idle or open for too long; another can be opened."""

    blame = Blame.NOBODY
    retryable = True
    code = "session_expired"


def error_from_code(code: str, message: str, retry_after_s: float = 1.0) -> PlanetServeError:
    """The error that a code stands for, for tools and tests; unknown codes become `RemoteError`.

    Not for what a peer reports: whoever rebuilt its class would let it decide on retries.
    """
    for cls in _walk(PlanetServeError):
        if cls.code == code:
            if issubclass(cls, CapacityError):
                return cls(message, retry_after_s)
            return cls(message)
    return RemoteError(message)


def _walk(cls: type[PlanetServeError]) -> list[type[PlanetServeError]]:
    found = [cls]
    for child in cls.__subclasses__():
        found.extend(_walk(child))
    return found
