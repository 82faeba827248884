"""Checks what each hop of a ring signs: by itself, against its neighbours, against the client.

The two ends of an edge must have signed for the same steps in the same state, after every
`RECEIPT_STEPS` steps and at the end. Where the client is one of the ends, the hop is at fault if
they differ; otherwise either of the two may be. Hops that leave a ring before its end are not asked
for a last receipt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from planetserve.errors import (
    EdgeMismatch,
    PeerReportedError,
    PlanetServeError,
    ReceiptError,
    ReceiptMissing,
    TransportError,
)
from planetserve.types import CLIENT, Hop, PeerId, ServerInfo
from planetserve.verification.digest import DIGEST_BYTES, EdgeDigest, EdgeState
from planetserve.verification.receipt import RECEIPT_STEPS, Receipt, quant_code
from planetserve.wire.frame import ANSWER_EDGE, WireDtype
from planetserve.wire.messages import NextHop, Rewire

_FINAL_TIMEOUT_S = 2.0
_KEPT_STEPS = 2 * RECEIPT_STEPS
"""Steps after which it no longer matters that an end has been signed for by one side alone."""


Compare = Callable[[PeerId, Receipt], None]
"""Takes a receipt and the peer that has signed it; raises what is wrong with it."""


@dataclass(frozen=True, slots=True)
class _Ends:
    """An edge of a hop while it has the same two ends."""

    edge: int
    epoch: int
    first_step: int


class HopReceipts:
    """The receipts of one hop, checked for what this client knows of it.

    Args:
        hop: who runs which blocks.
        info: what the hop's server announces.
        session_id: of the session.
        nonce: what the client offered the hop in OPEN.
        dtype: of the activations.
        compare: is given each receipt that is the hop's own.
    """

    def __init__(
        self,
        hop: Hop,
        info: ServerInfo,
        session_id: bytes,
        nonce: bytes,
        dtype: WireDtype,
        compare: Compare,
    ):
        self.signed_step = 0
        """The steps before this one are signed for, or were before the hop's time."""
        self.is_asked_last = False
        """Whether the session is over, so that the last receipt is due."""
        self.is_complete = asyncio.Event()
        """Set when the last receipt is here and agrees with all others."""
        self._hop = hop
        self._manifests = {bytes(DIGEST_BYTES), bytes.fromhex(info.manifest)} - {b""}
        self._fixed = (session_id, nonce, hop.start, hop.end, dtype, quant_code(info.quant_type))
        self._compare = compare
        self._number = 0
        self._last_out: _Ends | None = None
        self._incoming: list[_Ends] = []
        self._outgoing: list[_Ends] = []

    def opened(self, edge: int, epoch: int, following: NextHop | None, first_step: int) -> None:
        """The hop has been told of its two edges."""
        self._incoming.append(_Ends(edge, epoch, first_step))
        self._note_next(following, epoch, first_step)
        self.signed_step = first_step

    def rewired(self, message: Rewire) -> None:
        """The hop is told that one of its edges has another end from now on."""
        if message.previous is not None:
            edge = self._incoming[0].edge
            self._incoming.append(_Ends(edge, message.epoch, message.first_step))
        if message.next is not None:
            self._note_next(message.next, message.epoch, message.first_step)

    def take(self, payload: bytes | bytearray) -> None:
        """Check a receipt that has come.

        Raises:
            RemoteProtocolError: it is not the hop's own, or not the one that is due.
            ReceiptError: the hop has signed for something else than this client has sent or got.
            EdgeMismatch: it and a neighbour have signed for different activations.
        """
        receipt = Receipt.open(payload, self._hop.peer_id)
        fixed = (
            receipt.session_id, receipt.nonce, receipt.start, receipt.end, receipt.dtype,
            receipt.quant,
        )  # fmt: skip
        if fixed != self._fixed or receipt.manifest not in self._manifests:
            raise self._wrong("another session, other blocks or other weights")
        if receipt.number != self._number or self.is_complete.is_set():
            raise self._wrong("it is not the next one")
        self._number += 1
        if receipt.is_final:
            if not self.is_asked_last:
                raise self._wrong("the session is not over")
            ends = (_ends_at(self._incoming), _ends_at(self._outgoing))
        else:
            ends = self._check_periodic(receipt)
        for state, end in zip((receipt.incoming, receipt.outgoing), ends, strict=True):
            if (state.edge, state.epoch) != (end.edge, end.epoch):
                raise self._wrong("it is of another edge")
        self._compare(self._hop.peer_id, receipt)
        if receipt.is_final:
            self.is_complete.set()
        else:
            self.signed_step = receipt.outgoing.next_step

    def _check_periodic(self, receipt: Receipt) -> tuple[_Ends, _Ends]:
        """The ends of the hop's edges that the receipt is about."""
        step = receipt.outgoing.next_step
        last, last_out = self.signed_step, self._last_out
        due = last - last % RECEIPT_STEPS + RECEIPT_STEPS
        incoming = _ends_at(self._incoming, receipt.incoming)
        self._last_out = outgoing = _ends_at(self._outgoing, receipt.outgoing)
        # A step that is sent again, to another hop, is signed for again.
        is_again = step == last and outgoing != last_out and not step % RECEIPT_STEPS
        if receipt.incoming.next_step != step or not (step == due or is_again):
            raise self._wrong("it is not for the steps that are due")
        return incoming, outgoing

    def _note_next(self, following: NextHop | None, epoch: int, first_step: int) -> None:
        edge = ANSWER_EDGE if following is None else following.edge
        self._outgoing.append(_Ends(edge, epoch, first_step))

    def _wrong(self, why: str) -> ReceiptError:
        error = ReceiptError(f"server …{self._hop.peer_id[-6:]} sent a wrong receipt: {why}")
        error.peer_id = self._hop.peer_id
        return error


def _ends_at(known: Sequence[_Ends], state: EdgeState | None = None) -> _Ends:
    """Which ends an edge has for a receipt: the latest, or those that a receipt names and had until
    the step that it ends with."""
    for index, ends in enumerate(known[:-1]):
        if state is not None and (state.edge, state.epoch) == (ends.edge, ends.epoch):
            if state.next_step <= known[index + 1].first_step + 1:
                return ends
    return known[-1]


class _Key(NamedTuple):
    edge: int
    epoch: int
    next_step: int
    is_final: bool


@dataclass(frozen=True, slots=True)
class _Said:
    """What one end of an edge says of it: a hop, or `CLIENT` for this client."""

    who: str
    is_sender: bool
    state: EdgeState


class SigningHop(Protocol):
    """The part of `HopConnection` that is used here."""

    receipts: HopReceipts | None
    lost: PlanetServeError | None

    @property
    def peer_id(self) -> PeerId: ...
    async def finish(self, timeout_s: float) -> None: ...


class RingReceipts:
    """The receipts of one ring. Its digests observe the client's two ends.

    Args:
        session_id: of the session.
        num_rows: rows of the session.
    """

    def __init__(self, session_id: bytes, num_rows: int):
        self.sent = EdgeDigest(session_id, num_rows, self._on_sent)
        """Observes the edge to the first hop."""
        self.received = EdgeDigest(session_id, num_rows, self._on_received)
        """Observes the edge from the last hop."""
        self._waiting: dict[_Key, _Said] = {}
        """What has been said by one end of an edge alone."""

    def add(self, peer_id: PeerId, receipt: Receipt) -> None:
        """Compare a receipt.

        Raises:
            ReceiptError: the hop has signed for something else than this client has sent or got.
            EdgeMismatch: it and a neighbour have signed for different activations.
        """
        if receipt.outgoing.next_step > self.sent.next_step:
            raise _wrong(peer_id)
        self._compare(_Said(peer_id, False, receipt.incoming), is_final=receipt.is_final)
        self._compare(_Said(peer_id, True, receipt.outgoing), is_final=receipt.is_final)

    def check_due(self, hops: Sequence[SigningHop], next_step: int) -> None:
        """Before step `next_step`: every hop must have signed for all but the last few.

        Raises:
            ReceiptMissing: one has not; `peer_id` names it.
        """
        if next_step % RECEIPT_STEPS:
            return
        for hop in hops:
            if hop.receipts is not None and (hop.receipts.signed_step < next_step - RECEIPT_STEPS):
                raise _missing(hop.peer_id)
        self._waiting = {
            key: said
            for key, said in self._waiting.items()
            if key.next_step > next_step - _KEPT_STEPS
        }

    async def settle(self, hops: Sequence[SigningHop]) -> list[PlanetServeError]:
        """End the session at all hops; returns what is wrong with their last receipts."""
        for digest, is_sender in ((self.sent, True), (self.received, False)):
            said = _Said(CLIENT, is_sender, digest.state(with_rows=True))
            self._compare(said, is_final=True)
        signing = [(hop, hop.receipts) for hop in hops if hop.receipts is not None]
        await asyncio.gather(*(hop.finish(_FINAL_TIMEOUT_S) for hop, _ in signing))
        found: list[PlanetServeError] = []
        for hop, receipts in signing:
            if receipts.is_complete.is_set():
                continue
            unheard = hop.lost is None or isinstance(hop.lost, TransportError | PeerReportedError)
            found.append(_missing(hop.peer_id) if unheard else hop.lost)  # type: ignore[arg-type]
        return found + self._at_odds()

    def _at_odds(self) -> list[PlanetServeError]:
        """The edges whose ends have each signed for the session, but not for the same steps."""
        ends: dict[int, list[_Said]] = {}
        for key, said in self._waiting.items():
            if key.is_final:
                ends.setdefault(key.edge, []).append(said)
        return [_differ(*both) for both in ends.values() if len(both) == 2]

    def _on_sent(self) -> None:
        self._note(self.sent, is_sender=True)

    def _on_received(self) -> None:
        self._note(self.received, is_sender=False)

    def _note(self, digest: EdgeDigest, *, is_sender: bool) -> None:
        if digest.next_step % RECEIPT_STEPS == 0:
            said = _Said(CLIENT, is_sender, digest.state(with_rows=False))
            self._compare(said, is_final=False)

    def _compare(self, said: _Said, *, is_final: bool) -> None:
        state = said.state
        key = _Key(state.edge, state.epoch, state.next_step, is_final)
        other = self._waiting.get(key)
        if other is None:
            self._waiting[key] = said
        elif other.is_sender == said.is_sender:
            if other != said:
                raise _wrong(said.who)
        else:
            del self._waiting[key]
            if not _agree(other.state, state):
                raise _differ(other, said)


def _agree(one: EdgeState, other: EdgeState) -> bool:
    # An end that has come later does not know what the rows held before.
    knows_rows = one.epoch == 0
    return (
        one.chain == other.chain
        and one.num_tokens == other.num_tokens
        and (one.rows == other.rows or not knows_rows)
    )


def _differ(one: _Said, other: _Said) -> PlanetServeError:
    sender, receiver = (one, other) if one.is_sender else (other, one)
    if sender.who == CLIENT:
        return _wrong(receiver.who)
    if receiver.who == CLIENT:
        return _wrong(sender.who)
    error = EdgeMismatch(
        f"servers …{sender.who[-6:]} and …{receiver.who[-6:]} have signed for different "
        "activations between them"
    )
    error.edge = (sender.who, receiver.who)
    return error


def _wrong(peer_id: PeerId) -> ReceiptError:
    error = ReceiptError(
        f"server …{peer_id[-6:]} has signed for other activations than passed between it and this "
        "client"
    )
    error.peer_id = peer_id
    return error


def _missing(peer_id: PeerId) -> ReceiptMissing:
    error = ReceiptMissing(f"server …{peer_id[-6:]} has not signed in time for what it did")
    error.peer_id = peer_id
    return error
