"""Which step frame may come next on the edge that enters a session.

The client counts its steps and cuts each into chunks. A hop that lies about a number, a flag or a
chunk would otherwise have whoever comes after it answer wrongly; here the next hop refuses it. The
client knows exactly which answer is due (`client/ring/ring_step.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import FLAG_KEEP_LAST, FLAG_REPLAY, FrameHeader
from planetserve.wire.step import StepTable


@dataclass(slots=True)
class _Step:
    """The step that came last, and how much of it is here."""

    number: int
    num_chunks: int
    flags: int
    num_taken: int = 0
    ends: dict[int, int] = field(default_factory=dict)
    """Where the step's tokens end in each of its rows."""


class StepOrder:
    """The order of one session's frames at one hop.

    Args:
        first_step: what OPEN says: the number of the first step, behind one that fills the cache.
    """

    def __init__(self, first_step: int):
        self._first_step = first_step
        self._step: _Step | None = None
        self._before: _Step | None = None
        self._may_repeat = False

    def is_new(self, header: FrameHeader, table: StepTable) -> bool:
        """Take note of an authentic frame; False for one that was here before.

        Raises:
            RemoteProtocolError: neither the next frame nor a repeated one.
        """
        step = self._step
        if self._may_repeat and step is not None and self._is_repeated(header, step):
            return False
        if step is None or step.num_taken == step.num_chunks:
            step = self._begin(header, step)
        elif (header.step, header.chunk, header.num_chunks, header.flags, table.reorder) != (
            step.number, step.num_taken, step.num_chunks, step.flags, None,
        ):  # fmt: skip
            raise RemoteProtocolError("a step frame that is not the next chunk of its step")
        if step.num_chunks > 1:
            # Without this a step could bring more tokens than its rows can hold.
            for piece in table.rows:
                if step.ends.setdefault(piece.row, piece.start) != piece.start:
                    raise RemoteProtocolError("a chunk that does not go on where its step ended")
                step.ends[piece.row] = piece.end
        step.num_taken += 1
        self._may_repeat = False
        return True

    def repeat(self, *, drops_step: bool) -> None:
        """Another hop is upstream from now on, which sends again what it cannot know to be here.

        `drops_step`: what is here of the last step has been thrown away.
        """
        self._may_repeat = True
        if drops_step:
            self._step = self._before

    def _is_repeated(self, header: FrameHeader, step: _Step) -> bool:
        return header.step == step.number and header.chunk < step.num_taken

    def _begin(self, header: FrameHeader, last: _Step | None) -> _Step:
        number, flags = header.step, header.flags
        if last is not None:
            is_due = number == last.number + 1 and not flags & FLAG_REPLAY
        elif flags & FLAG_REPLAY:
            is_due = number == max(0, self._first_step - 1) and not flags & FLAG_KEEP_LAST
        else:
            is_due = number == self._first_step
        if not is_due or header.chunk:
            raise RemoteProtocolError("a step frame that is not of the next step")
        self._before = last
        self._step = step = _Step(number, header.num_chunks, flags)
        return step
