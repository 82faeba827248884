"""What a hop has sent on, kept so that whoever takes the next hop's place can be filled.

Two parts: what belongs to steps that the client has its answers to, as rows; and the frames of the
step under way, as they were, since some hops downstream may have seen them and some not. Rows are
as long as the session has leased, and a step brings each of their tokens once (`step_order.py`), so
each part holds at most one hidden state for every leased token; more is refused here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from planetserve.edge.chunk import StepChunk, split_step
from planetserve.errors import RemoteProtocolError
from planetserve.history import History
from planetserve.types import PeerId
from planetserve.wire.frame import FLAG_REPLAY


class ReplayBytes:
    """Bytes in the replay buffers of a server's sessions, by the peer that opened them."""

    def __init__(self) -> None:
        self.per_peer: Counter[PeerId] = Counter()

    def add(self, peer: PeerId, num_bytes: int) -> None:
        """A replay buffer of the peer holds so many more, or less if negative."""
        self.per_peer[peer] += num_bytes
        if not self.per_peer[peer]:
            del self.per_peer[peer]

    @property
    def total(self) -> int:
        """Bytes in all replay buffers."""
        return self.per_peer.total()


class ReplayBuffer:
    """The record of one edge of a session of `num_rows` rows.

    Args:
        num_rows: rows of the session.
        peer: who opened it.
        counted: where its bytes are counted.
        max_tokens: how many tokens the session may hold at present, all rows together.
    """

    def __init__(
        self, num_rows: int, peer: PeerId, counted: ReplayBytes, max_tokens: Callable[[], int]
    ):
        self._settled = History(num_rows)
        self._recent: list[StepChunk] = []
        self._num_recent_tokens = 0
        self._peer = peer
        self._counted = counted
        self._max_tokens = max_tokens
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of hidden states that are kept; those that rows share count for each of them."""
        return self._num_bytes

    def add(self, chunk: StepChunk) -> None:
        """Record a frame; the frames of a step before it are taken for answered.

        Raises:
            RemoteProtocolError: a step of more tokens than the session has leased.
        """
        if self._recent and self._recent[-1].step != chunk.step:
            self.settle(chunk.step)
        num_tokens = self._num_recent_tokens + len(chunk.hidden_TD)
        if num_tokens > self._max_tokens():
            raise RemoteProtocolError("a step of more tokens than the session has leased")
        hidden_TD = chunk.hidden_TD
        if hidden_TD.untyped_storage().nbytes() > 2 * hidden_TD.nbytes:
            # A row of a batch would keep the whole batch in memory.
            chunk = chunk.with_hidden(hidden_TD.clone())
        self._recent.append(chunk)
        self._num_recent_tokens = num_tokens
        self._count(hidden_TD.shape[1] * hidden_TD.itemsize)

    def settle(self, first_step: int) -> None:
        """Steps before `first_step` are answered: only what they left in the rows counts."""
        settled = [chunk for chunk in self._recent if chunk.step < first_step]
        if not settled:
            return
        for chunk in settled:
            self._settled.append(chunk.table, chunk.hidden_TD)
        self._recent = self._recent[len(settled) :]
        self._num_recent_tokens -= sum(len(chunk.hidden_TD) for chunk in settled)

    def close(self) -> None:
        """Forget everything."""
        self._recent, self._num_recent_tokens = [], 0
        self._settled = History(0)
        self._count(0)

    def _count(self, token_bytes: int) -> None:
        num_tokens = self._num_recent_tokens + sum(self._settled.lengths)
        before, self._num_bytes = self._num_bytes, num_tokens * token_bytes
        self._counted.add(self._peer, self._num_bytes - before)

    def chunks(self, first_step: int, max_tokens: int) -> list[StepChunk]:
        """What the next hop's replacement may lack, in order: one step that fills an empty hop with
        all that belongs to steps before `first_step`, in chunks of at most `max_tokens` tokens, and
        the frames of the step under way."""
        self.settle(first_step)
        replay = self._settled.replay()
        if replay is None:
            return self.recent()
        step = max(0, first_step - 1)
        return split_step(*replay, max_tokens, step=step, flags=FLAG_REPLAY) + self.recent()

    def recent(self) -> list[StepChunk]:
        """The frames that are not settled, in order."""
        return list(self._recent)
