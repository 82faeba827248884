"""An inference session: the synchronous face of `session_core.py`.

Blocks that the client keeps to itself run here, around the ring; what is replayed is what went into
the ring.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType

import torch

from planetserve.client.event_loop_thread import EventLoopThread
from planetserve.client.hf.conversation import Conversation, HeldText
from planetserve.client.hf.local_blocks import LocalEnds, LocalRows
from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.ring.step_checks import table_by_hand
from planetserve.client.session_core import SessionCore, closed_error
from planetserve.errors import ConfigError
from planetserve.types import Chain
from planetserve.wire.step import StepTable


class InferenceSession:
    """Rows of one batch on one chain at a time.

    Args:
        max_length: tokens per row this session may hold; a step past it raises
            `SessionLengthError`. None: as many as the chain's servers allow.
        lease_tokens: tokens per row to lease when the chain is opened (default: `max_length`).
        local: the client's own blocks, if it has some.

    Use as a context manager, or call `close()`. One step at a time; any thread.
    """

    def __init__(
        self,
        manager: ChainManager,
        loop_thread: EventLoopThread,
        *,
        max_length: int | None = None,
        lease_tokens: int | None = None,
        local: LocalEnds | None = None,
    ):
        self._core = SessionCore(manager, max_length=max_length, lease_tokens=lease_tokens)
        self.conversation = Conversation()
        """The text that `generate()` continues."""
        self.cache: HeldText | None = None
        """The Hugging Face cache that stands for this session in `generate()`."""
        self.turn = threading.Lock()
        """Held by the `generate()` that is under way."""
        self._manager = manager
        self._loop_thread = loop_thread
        self._local = local
        self._local_rows: LocalRows | None = None
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether the session has been closed."""
        return self._core.closed

    @property
    def chain(self) -> Chain | None:
        """The chain in use, or None before the first step."""
        return self._core.chain

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held per row; empty before the first step."""
        return self._core.lengths

    @property
    def num_steps(self) -> int:
        """Steps that have gone through so far."""
        return self._core.num_steps

    @property
    def max_length(self) -> int | None:
        """Tokens per row that the session may hold; None if only the servers limit it."""
        return self._core.max_length

    @property
    def position(self) -> int:
        """Tokens in the longest row, without the last one that `generate()` has chosen, which no
        block has seen. Setting a smaller number takes as many tokens back from every row."""
        if self.conversation.output_ids is not None:
            return self.conversation.position
        return max(self.lengths, default=0)

    @position.setter
    def position(self, position: int) -> None:
        if not isinstance(position, int) or not 0 <= position <= self.position:
            raise ConfigError(
                f"position {position!r} is not within the {self.position} tokens of the session; "
                "a session can only be rolled back"
            )
        num_taken_back = self.position - position
        if self.conversation.output_ids is not None:
            # The next turn compares the text with what the servers hold.
            self.conversation.take_back(num_taken_back)
        else:
            self._core.truncate([max(0, held - num_taken_back) for held in self.lengths])

    @property
    def output_ids(self) -> torch.Tensor | None:
        """Token ids of the conversation so far `[batch, tokens]`; kept by `generate()`."""
        return self.conversation.output_ids

    @property
    def last_token_id(self) -> torch.Tensor | None:
        """The last token of each row of `output_ids`, `[batch, 1]`."""
        ids = self.conversation.output_ids
        return None if ids is None else ids[:, -1:]

    def step(
        self,
        inputs_BTD: torch.Tensor,
        prompts: None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run `[batch, tokens, hidden]` inputs through all blocks, appending to every row. After
        `generate()` they go on at `position`, and `generate()` goes on no more.

        Args:
            inputs_BTD: hidden states as the embedding makes them; the first call fixes the batch.
            prompts: must be None; it keeps the place that deep prompts have in Petals' signature.
            hypo_ids: row `i` first becomes a copy of row `hypo_ids[i]`.

        Returns:
            The outputs of the last block, same shape and dtype.
        """
        if prompts is not None:
            raise ConfigError("deep prompts are not supported; leave prompts out")
        self._end_conversation()
        table = table_by_hand(inputs_BTD, hypo_ids, self.lengths)
        num_rows, num_tokens, width = inputs_BTD.shape
        output_TD = self.run(num_rows, table, inputs_BTD.detach().cpu().reshape(-1, width))
        return output_TD.reshape(num_rows, num_tokens, width)

    def _end_conversation(self) -> None:
        """Hidden states go on behind the `position` of the text, which then is none of tokens."""
        cache = self.cache
        if cache is None or self._core.history is None:
            return
        lengths = self.conversation.rows_in(cache)
        if lengths is None or len(lengths) != len(self.lengths):
            raise ConfigError(
                "servers hold the text of this session in other rows than step() can go on with, "
                "as after a beam search; open another session"
            )
        self._core.truncate(lengths)
        self.cache, self.conversation = None, Conversation()

    def run(
        self, num_rows: int, table: StepTable, hidden_TD: torch.Tensor, *, keep_last: bool = False
    ) -> torch.Tensor:
        """Run one ragged step; see `wire/step.py` for what a table says.

        Raises:
            SessionLengthError: a row would pass `max_length`.
            SessionClosed: the session or its model has been closed.
            PlanetServeError: no chain could run the step within the bounded retries.
        """
        with self._lock:
            is_first = self._core.begin(num_rows, table, hidden_TD)
            if self._local is None:
                work = self._core.run(num_rows, table, hidden_TD, keep_last=keep_last)
                return self._loop_thread.call(work)
            if is_first:
                self._local_rows = LocalRows(self._local, num_rows)
            local = self._local_rows
            if local is None:  # closed meanwhile, from another thread
                raise closed_error()
            return self._run_around(local, num_rows, table, hidden_TD, keep_last=keep_last)

    def expect(self, num_tokens: int) -> None:
        """Lease room for so many tokens per row when servers are next asked for some."""
        self._core.expect(num_tokens)

    def restart(self) -> None:
        """Forget all rows. The next step may bring a batch of another size."""
        with self._lock:
            self._core.history = self._local_rows = None
            self._loop_thread.post(self._core.leave())

    def park(self) -> None:
        """Release the servers' memory until the next step, which brings the rows to servers again.
        Does nothing while a step is under way."""
        if self._lock.acquire(blocking=False):
            try:
                self._loop_thread.post(self._core.leave())
            finally:
                self._lock.release()

    def fork(self, rows: Sequence[int] | None = None) -> InferenceSession:
        """Another session that holds what this one does, or these of its rows. Servers compute
        them once more, at its first step."""
        with self._lock:
            fork = InferenceSession(self._manager, self._loop_thread, local=self._local)
            fork._core = self._core.fork(rows)
            if self._local_rows is not None:
                chosen = range(len(self.lengths)) if rows is None else rows
                fork._local_rows = self._local_rows.select(chosen)
            return fork

    def close(self) -> None:
        """Release the servers' memory. Idempotent; safe from any thread."""
        if not self._core.closed:
            self._core.closed = True  # for whoever comes before the event loop gets to it
            self._loop_thread.post(self.release())

    async def release(self) -> None:
        """`close()` for callers on the event loop; returns when the servers have been told."""
        self._local_rows = None
        await self._core.release()

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run_around(
        self,
        local: LocalRows,
        num_rows: int,
        table: StepTable,
        hidden_TD: torch.Tensor,
        *,
        keep_last: bool,
    ) -> torch.Tensor:
        """A step through the client's first blocks, the ring, and the client's last blocks."""
        entering_TD = local.enter(table, hidden_TD)
        keep_last = keep_last and not local.needs_every_output
        work = self._core.run(num_rows, table, entering_TD, keep_last=keep_last)
        leaving_TD = self._loop_thread.call(work)
        try:
            return local.leave(table, leaving_TD)
        except BaseException:
            # The servers have taken the step and the client's last blocks have not.
            self.close()
            raise
