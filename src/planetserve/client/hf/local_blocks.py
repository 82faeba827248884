"""Blocks that the client runs itself, before and after those of the swarm (`local_blocks`).

Loads them with the same `SpanBlocks` that servers use, and gives every row of a session a plain
cache. A step runs `run_first`, the ring, and `run_last`. Its changes to the caches count only when
`run_last` has returned, so a step that fails before that changes nothing. The session records what
enters the ring, so a server that fails never makes a local block run again.

Weights and caches take as much of the client's memory per block as of a server's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

import torch

from planetserve.client.planning.block_ranges import BlockSplit
from planetserve.errors import ConfigError, SessionClosed
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.model.span_cache import SpanCache, layer_kinds
from planetserve.model.text_config import text_config
from planetserve.types import BlockSpan
from planetserve.wire.step import StepTable

Caches = tuple[SpanCache, ...]
"""Keys and values of one session, a cache for each row. Never changed once a step is done."""


class LocalBlocks:
    """One span of blocks in this process, shared by all sessions."""

    def __init__(self, blocks: SpanBlocks):
        self._blocks = blocks
        self._lock = threading.Lock()

    @classmethod
    def load(cls, checkpoint: Checkpoint, span: BlockSpan, dtype: torch.dtype) -> LocalBlocks:
        """Read the weights of `span`.

        Raises:
            ConfigError: a block keeps states, which a client cannot roll back.
            ModelError: weights are missing or damaged.
        """
        kinds = layer_kinds(text_config(checkpoint.config))[span.start : span.end]
        if any(kind.num_states for kind in kinds):
            raise ConfigError(
                f"local_blocks: blocks {span} have recurrent layers, which only servers run; "
                "choose other blocks or leave local_blocks out"
            )
        return cls(SpanBlocks.load(checkpoint, span, dtype))

    def make_caches(self, num_rows: int) -> Caches:
        """Empty caches for a session."""
        return tuple(self._blocks.make_cache() for _ in range(num_rows))

    @torch.no_grad()
    def run(
        self, table: StepTable, hidden_TD: torch.Tensor, caches: Caches
    ) -> tuple[torch.Tensor, Caches]:
        """The step's hidden states after these blocks, `[T, D]`, and the caches after the step.

        Raises:
            SessionClosed: a row starts after what its cache holds.
        """
        rows = list(caches if table.reorder is None else (caches[row] for row in table.reorder))
        outputs, offset = [], 0
        for piece in table.rows:
            stop = offset + piece.num_tokens
            positions = range(piece.start, piece.end)
            if table.positions is not None:
                positions_1T = torch.tensor([table.positions[offset:stop]])
            else:
                positions_1T = torch.tensor([list(positions)])
            cache = rows[piece.row] = self._prepared(rows[piece.row], piece.start)
            with self._lock:
                output = self._blocks.run(hidden_TD[None, offset:stop], positions_1T, cache)
            outputs.append(output[0])
            offset = stop
        return torch.cat(outputs), tuple(rows)

    def _prepared(self, cache: SpanCache, length: int) -> SpanCache:
        """A cache of its own that holds the first `length` tokens of `cache`."""
        if not length:
            return self._blocks.make_cache()
        held = cache.get_seq_length(cache.span.start)
        if held < length:
            raise SessionClosed(
                "the client's own blocks missed a step that was interrupted; open another session"
            )
        fork = self._blocks.make_cache()
        # Layers replace their tensors and never write into them, so two caches may share them.
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        fork.truncate(length)
        return fork


class LocalEnds:
    """The client's blocks on both sides of the swarm's; either side may be absent."""

    def __init__(self, before: LocalBlocks | None, after: LocalBlocks | None):
        self.before = before
        self.after = after

    @classmethod
    def load(cls, checkpoint: Checkpoint, split: BlockSplit, dtype: torch.dtype) -> LocalEnds:
        """Read the weights of the local blocks of `split`.

        Raises:
            ModelError: weights are missing or damaged.
        """
        before, after = (
            LocalBlocks.load(checkpoint, span, dtype) if span else None
            for span in (split.before, split.after)
        )
        return cls(before, after)


class LocalRows:
    """The caches that one session of `num_rows` rows has in the local blocks."""

    def __init__(self, ends: LocalEnds, num_rows: int):
        self._ends = ends
        self._before = ends.before.make_caches(num_rows) if ends.before else ()
        self._after = ends.after.make_caches(num_rows) if ends.after else ()
        self._staged = self._before

    @property
    def needs_every_output(self) -> bool:
        """Whether `leave` must see the outputs of all tokens of a step."""
        return self._ends.after is not None

    def select(self, rows: Sequence[int]) -> LocalRows:
        """Other rows, of which row `i` holds what row `rows[i]` of these does."""
        selected = LocalRows(self._ends, 0)
        # Caches are never changed once a step is done, so both may use them.
        selected._before = tuple(self._before[row] for row in rows) if self._before else ()
        selected._staged = selected._before
        selected._after = tuple(self._after[row] for row in rows) if self._after else ()
        return selected

    def run_first(self, table: StepTable, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Run the first blocks on the output of the embedding; returns the input of the swarm's
        first block, `[T, D]`."""
        if self._ends.before is None:
            return hidden_TD
        output_TD, self._staged = self._ends.before.run(table, hidden_TD, self._before)
        return output_TD

    def run_last(self, table: StepTable, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Run the last blocks on the output of the swarm's last block, and end the step."""
        if self._ends.after is not None:
            hidden_TD, self._after = self._ends.after.run(table, hidden_TD, self._after)
        self._before = self._staged
        return hidden_TD
