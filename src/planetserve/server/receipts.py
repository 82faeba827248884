"""A hop's receipts: signed every so many steps and when the client closes the session."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.crypto.identity import Identity
from planetserve.errors import PlanetServeError
from planetserve.model.manifest import OwnWeights
from planetserve.swarm.network import Stream
from planetserve.tensors import named_dtype, wire_dtype
from planetserve.verification.digest import DIGEST_BYTES, EdgeDigest
from planetserve.verification.receipt import RECEIPT_STEPS, Receipt, quant_code
from planetserve.wire.frame import ANSWER_EDGE, FrameHeader, FrameType
from planetserve.wire.messages import OpenSession, Rewire, from_text

_SEND_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ReceiptSigner:
    """What all receipts of a server say, and who signs them."""

    identity: Identity
    weights: OwnWeights
    quant_type: str
    clock: Clock


class SessionReceipts:
    """The receipts of one session at this hop.

    Args:
        signer: of the server.
        session_id: of the session.
        message: its OPEN.
        stream: the client's.
    """

    def __init__(
        self, signer: ReceiptSigner, session_id: bytes, message: OpenSession, stream: Stream
    ):
        self.incoming = EdgeDigest(session_id, message.num_rows)
        """Observes the edge that enters this hop."""
        self.outgoing = EdgeDigest(session_id, message.num_rows, self._on_step)
        """Observes the edge that leaves it."""
        self._signer = signer
        self._session_id = session_id
        self._message = message
        self._stream = stream
        self._opened_ms = self._now_ms()
        self._number = 0
        self._sending: set[asyncio.Task[None]] = set()
        following = message.next
        out_edge = ANSWER_EDGE if following is None else following.edge
        self.incoming.start(message.edge, message.epoch, message.first_step)
        self.outgoing.start(out_edge, message.epoch, message.first_step)

    def rewired(self, message: Rewire) -> None:
        """One of the edges has another end from now on."""
        if message.previous is not None:
            self.incoming.start(self._message.edge, message.epoch, message.first_step)
        if message.next is not None:
            self.outgoing.start(message.next.edge, message.epoch, message.first_step)

    async def send_final(self) -> None:
        """Sign for all of the session. Never raises."""
        await asyncio.gather(*self._sending, return_exceptions=True)
        await self._send(self._next_receipt(is_final=True))

    def stop(self) -> None:
        """Send nothing more."""
        for task in self._sending:
            task.cancel()

    def _on_step(self) -> None:
        """A step has been sent on: what has come in until now is that step's, too."""
        if self.outgoing.next_step % RECEIPT_STEPS == 0:
            task = asyncio.create_task(self._send(self._next_receipt(is_final=False)))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    def _next_receipt(self, *, is_final: bool) -> Receipt:
        message, signer = self._message, self._signer
        number, self._number = self._number, self._number + 1
        manifest = signer.weights.manifest
        return Receipt(
            session_id=self._session_id,
            nonce=from_text(message.offer),
            start=message.start,
            end=message.end,
            dtype=wire_dtype(named_dtype(message.dtype)),
            quant=quant_code(signer.quant_type),
            manifest=bytes.fromhex(manifest) if manifest else bytes(DIGEST_BYTES),
            number=number,
            is_final=is_final,
            incoming=self.incoming.state(with_rows=is_final),
            outgoing=self.outgoing.state(with_rows=is_final),
            opened_ms=self._opened_ms,
            signed_ms=self._now_ms(),
        )

    def _now_ms(self) -> int:
        return max(0, round(1000 * self._signer.clock.unix()))

    async def _send(self, receipt: Receipt) -> None:
        header = FrameHeader(FrameType.RECEIPT, session=self._session_id, edge=self._message.edge)
        with contextlib.suppress(PlanetServeError, TimeoutError):
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._stream.send(header, receipt.sign(self._signer.identity))
