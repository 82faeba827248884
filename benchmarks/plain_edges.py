"""Edges that protect nothing, for benchmarks that measure what protection costs.

Same interface and same sequence and epoch rules as `crypto/channel.py`, but payloads travel as they
are and nothing is authenticated. The product has no such thing: `use` puts it into the running
program, and a peer that runs it cannot talk to one that does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planetserve.crypto.channel import Buffer, EdgeOpener, EdgeSealer
from planetserve.crypto.secrets import decryption_failed
from planetserve.edge import receiver
from planetserve.edge.sender import StepSender
from planetserve.errors import LocalProtocolError
from planetserve.wire.frame import Direction, FrameHeader


class PlainSealer:
    """Used in place of an `EdgeSealer`; its secret is ignored."""

    def __init__(
        self,
        edge_secret: bytes | bytearray,
        session_id: bytes,
        edge: int,
        epoch: int,
        direction: Direction,
        now_s: float,
    ):
        self._name = (session_id, edge, epoch, direction)
        self._sequence = 0

    def seal(
        self, header: FrameHeader, parts: Sequence[Buffer], now_s: float
    ) -> tuple[FrameHeader, Sequence[Buffer]]:
        """The numbered frame, with its payload as it was.

        Raises:
            LocalProtocolError: the header is of another edge.
        """
        if (header.session, header.edge, header.epoch, header.direction) != self._name:
            raise LocalProtocolError("a frame of another session, edge, epoch or direction")
        num_bytes = sum(memoryview(part).nbytes for part in parts)
        header = header.numbered(self._sequence, num_bytes)
        self._sequence += 1
        return header, parts

    def erase(self) -> None:
        """There is nothing to erase."""


class PlainOpener:
    """Used in place of an `EdgeOpener`; its secret is ignored."""

    def __init__(
        self,
        edge_secret: bytes | bytearray,
        session_id: bytes,
        edge: int,
        epoch: int,
        direction: Direction,
    ):
        self._name = (session_id, edge, epoch, direction)
        self._sequence = 0
        self.failed = False

    def open(self, header: FrameHeader, payload: bytearray) -> bytearray:
        """`payload`, if its header is the next of this edge.

        Raises:
            DecryptionFailed: it is not, or an earlier one was not.
        """
        self.failed = (
            self.failed
            or (header.session, header.edge, header.epoch, header.direction) != self._name
            or header.sequence != self._sequence
            or header.payload_bytes != len(payload)
        )
        if self.failed:
            raise decryption_failed()
        self._sequence += 1
        return payload

    def erase(self) -> None:
        """Open nothing any more."""
        self.failed = True


KINDS: dict[str, tuple[Any, Any]] = {
    "sealed": (EdgeSealer, EdgeOpener),
    "plain": (PlainSealer, PlainOpener),
}
_init = StepSender.__init__


def use(kind: str) -> None:
    """Sessions that this process opens or admits from now on have edges of this kind."""
    new_sealer, new_opener = KINDS[kind]

    def init(sender: StepSender, *args: Any) -> None:
        _init(sender, *args, new_sealer=new_sealer)

    StepSender.__init__ = init  # type: ignore[method-assign,assignment]
    receiver.EdgeOpener = new_opener  # type: ignore[misc]
