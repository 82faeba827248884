"""The text of a session that several `generate()` calls continue, as token ids and mask.

`remote_cache.py` knows what the servers hold of it: after a beam search, a rollback or a failed
call that may be less, more or in other rows. Each turn compares the two.
"""

from __future__ import annotations

from typing import Protocol

import torch


class HeldText(Protocol):
    """What servers hold of a text; see `RemoteCache`."""

    reorder: tuple[int, ...] | None

    @property
    def num_columns(self) -> int: ...

    def row_lengths(self) -> tuple[int, ...]: ...

    def keep_common(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> None: ...


class Conversation:
    """Rows of token ids, and a mask of those that are text."""

    def __init__(self) -> None:
        self.output_ids: torch.Tensor | None = None
        """`[batch, tokens]`: prompts and answers so far; None before the first turn."""
        self.attention_mask: torch.Tensor | None = None
        """`[batch, tokens]` of 0 and 1, as the last turn used it."""
        self.is_mask_given = False
        """Whether some turn was given a mask."""
        self._num_seen = 0
        """Number of columns that the blocks have processed."""

    @property
    def position(self) -> int:
        """Number of tokens in the longest row that the blocks have processed."""
        if self.attention_mask is None or not self._num_seen:
            return 0
        return int(self.attention_mask[:, : self._num_seen].sum(dim=1).max())

    def store(self, ids: torch.Tensor, mask: torch.Tensor, is_mask_given: bool) -> None:
        """Store the text at the end of a turn. The blocks have not processed its last token."""
        self.output_ids, self.attention_mask, self.is_mask_given = ids, mask, is_mask_given
        self._num_seen = ids.shape[1] - 1

    def take_back(self, num_columns: int) -> None:
        """Remove this many columns from the end of those that the blocks have processed, and all
        columns after them."""
        if not num_columns or self.output_ids is None or self.attention_mask is None:
            return
        self._num_seen = max(0, self._num_seen - num_columns)
        self.output_ids = self.output_ids[:, : self._num_seen]
        self.attention_mask = self.attention_mask[:, : self._num_seen]

    def rows_in(self, cache: HeldText) -> tuple[int, ...] | None:
        """Number of tokens per row that the blocks have processed; None if the servers hold them in
        other rows."""
        if self.output_ids is None or self.attention_mask is None:
            return None
        # The last column is what a turn would feed.
        ids, mask = self.output_ids[:, : self._num_seen], self.attention_mask[:, : self._num_seen]
        cache.keep_common(
            torch.nn.functional.pad(ids, (0, 1)), torch.nn.functional.pad(mask, (0, 1))
        )
        if cache.reorder is not None or cache.num_columns != self._num_seen:
            return None
        return cache.row_lengths()
