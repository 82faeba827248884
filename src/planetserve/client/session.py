"""An inference session: the synchronous interface to `session_core.py`.

Blocks that the client runs itself run here, before and after the ring; a replay repeats what
entered the ring.
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
from planetserve.errors import ConfigError, PlanetServeError
from planetserve.types import Chain
from planetserve.wire.step import StepTable


class InferenceSession:
    """Rows of one batch, on one chain at a time.

    Args:
        max_length: tokens per row this session may hold; a step past it raises
            `SessionLengthError`. None: as many as the chain's servers allow.
        lease_tokens: tokens per row to reserve when the chain is opened (default: `max_length`).
        local: the blocks that the client runs itself, if any.

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
        """Held while a `generate()` uses the session."""
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
    def receipt_errors(self) -> tuple[PlanetServeError, ...]:
        """What was wrong with the last receipts of servers that the session has let go of, by now.

        What the session returned may be wrong then. Empty unless the client's setting `receipts`
        asks for them.
        """
        return tuple(self._core.receipt_errors)

    @property
    def num_steps(self) -> int:
        """Number of steps that have succeeded."""
        return self._core.num_steps

    @property
    def max_length(self) -> int | None:
        """Tokens per row that the session may hold; None if only the servers limit it."""
        return self._core.max_length

    @property
    def position(self) -> int:
        """Tokens in the longest row, without the last one that `generate()` chose, which no block
        has processed. Setting a smaller number removes as many tokens from the end of every row."""
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
        """Run `[batch, tokens, hidden]` inputs through all blocks, appending to every row. After a
        `generate()` they start at `position`, and `generate()` cannot continue the session.

        Args:
            inputs_BTD: output of the embedding; the first call fixes the batch size.
            prompts: must be None; Petals has deep prompts in this place.
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
        """Forget the token ids: hidden states are appended after `position`."""
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
        """Run one ragged step; `wire/step.py` explains the table.

        Raises:
            SessionLengthError: a row would pass `max_length`.
            SessionClosed: the session or its model has been closed.
            PlanetServeError: no chain could run the step within the bounded retries.
        """
        with self._lock:
            is_first = self._core.prepare_step(num_rows, table, hidden_TD)
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
        """Reserve this many tokens per row the next time that the session opens a ring."""
        self._core.expect(num_tokens)

    def restart(self) -> None:
        """Forget all rows. The next step may have another batch size."""
        with self._lock:
            self._core.history = self._local_rows = None
            self._loop_thread.post(self._core.close_ring())

    def park(self) -> None:
        """Release the servers' memory until the next step, which replays the rows. Does nothing
        while a step runs."""
        if self._lock.acquire(blocking=False):
            try:
                self._loop_thread.post(self._core.close_ring())
            finally:
                self._lock.release()

    def fork(self, rows: Sequence[int] | None = None) -> InferenceSession:
        """Another session with the same rows, or with the given ones of them. Servers compute them
        again at its first step."""
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
        entering_TD = local.run_first(table, hidden_TD)
        keep_last = keep_last and not local.needs_every_output
        work = self._core.run(num_rows, table, entering_TD, keep_last=keep_last)
        leaving_TD = self._loop_thread.call(work)
        try:
            return local.run_last(table, leaving_TD)
        except BaseException:
            # The servers have taken the step and the client's last blocks have not.
            self.close()
            raise
