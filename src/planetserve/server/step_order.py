"""Which frame may come next on the edge that enters a hop.

Steps are numbered without gaps and their chunks come in order, as many as the first one says and
with the same flags. A hop passes these fields on as they are, so one that took whatever came would
answer the client, or the next hop, with what another hop made of them.
"""

from __future__ import annotations

from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import FLAG_REPLAY, FrameHeader


class StepOrder:
    """Of one session at one hop, whoever sends its frames."""

    def __init__(self) -> None:
        self._step = -1
        self._next_chunk = 0
        self._num_chunks = 0
        self._flags = 0

    def take(self, header: FrameHeader) -> bool:
        """Whether this frame is the one that is due; False if it has been taken before.

        It may come again from a hop that cannot know how far this one has come.

        Raises:
            RemoteProtocolError: it does not follow the frame before it.
        """
        step, chunk = header.step, header.chunk
        if (step, chunk) < (self._step, self._next_chunk):
            return False
        if self._next_chunk < self._num_chunks:
            due = (self._step, self._next_chunk, self._num_chunks, self._flags)
            follows = (step, chunk, header.num_chunks, header.flags) == due
        else:
            # The first step may have any number: a hop that joins later is filled with one.
            is_first = self._step < 0
            may_replay = is_first or not header.flags & FLAG_REPLAY
            follows = chunk == 0 and (is_first or step == self._step + 1) and may_replay
        if not follows:
            raise RemoteProtocolError("a step frame that does not follow the one before")
        self._step, self._next_chunk = step, chunk + 1
        self._num_chunks, self._flags = header.num_chunks, header.flags
        return True

    def restart_step(self) -> None:
        """The step under way comes again, from its first chunk."""
        self._step -= 1
        self._next_chunk = self._num_chunks
