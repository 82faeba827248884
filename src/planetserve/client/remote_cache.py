"""The Hugging Face cache of a distributed model: no keys or values, only what stands for them.

`generate()` sees a `Cache` whose length, crop and reorder work; here they become bookkeeping that
the next step carries to the servers (rollback and reorder need no round trip of their own).

Hugging Face counts *columns*, padding included; servers hold only the real tokens of each row. The
cache keeps the mask of all columns so far and so knows where each row's tokens end. While there is
no padding, the size of that mask says all.
"""

from __future__ import annotations

import weakref

import torch
from transformers import Cache

from planetserve.client.session import InferenceSession
from planetserve.errors import ConfigError


class RemoteCache(Cache):
    """Stands for the KV cache of one `InferenceSession`.

    The session is closed when the cache is garbage-collected, unless `keep_session`.
    """

    def __init__(self, session: InferenceSession, *, keep_session: bool = False):
        super().__init__(layers=[])
        self.session = session
        self._size: tuple[int, int] | None = None
        """Rows and columns; None before the first step."""
        self._mask_BS: torch.Tensor | None = None
        """Bool `[rows, columns]`: which columns hold real tokens. None while all do."""
        self.reorder: tuple[int, ...] | None = None
        """Row reordering that the next step must carry."""
        if not keep_session:
            weakref.finalize(self, session.close)

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 before the first step."""
        return 0 if self._size is None else self._size[0]

    @property
    def is_padded(self) -> bool:
        """Whether some column of some row holds no token."""
        return self._mask_BS is not None

    def row_lengths(self) -> tuple[int, ...]:
        """Real tokens per row, after pending crops and reorders."""
        if self._mask_BS is not None:
            return tuple(self._mask_BS.sum(dim=1).tolist())
        return () if self._size is None else (self._size[1],) * self._size[0]

    def commit(self, num_rows: int, num_columns: int, mask_BT: torch.Tensor | None) -> None:
        """A step went through: these columns (where the mask is True, or all) now hold tokens."""
        self.reorder = None
        past = self.get_seq_length()
        self._size = num_rows, past + num_columns
        if self._mask_BS is None and mask_BT is None:
            return
        old_BS, new_BT = self._mask_BS, mask_BT
        if old_BS is None:
            old_BS = torch.ones(num_rows, past, dtype=torch.bool)
        if new_BT is None:
            new_BT = torch.ones(num_rows, num_columns, dtype=torch.bool)
        self._mask_BS = torch.cat([old_BS, new_BT], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far."""
        return 0 if self._size is None else self._size[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Key-value length and offset, as a full-attention layer reports them."""
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No maximum of its own."""
        return -1

    def get_max_length(self, layer_idx: int = 0) -> int:
        """No maximum of its own."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop columns from the end.

        Negative: so many of them. Positive: keep so many (the older meaning of the argument).
        """
        if self._size is None or not tokens_to_remove:
            return
        num_rows, num_columns = self._size
        self._size = num_rows, len(range(num_columns)[:tokens_to_remove])
        if self._mask_BS is not None:
            self._mask_BS = self._mask_BS[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row `i` continues what row `beam_idx[i]` held."""
        if self._size is None:
            return
        rows = tuple(int(row) for row in beam_idx)
        if len(rows) != self.num_rows:
            raise ConfigError("a distributed cache cannot change its number of rows")
        before = self.reorder or tuple(range(len(rows)))
        self.reorder = tuple(before[row] for row in rows)
        if self._mask_BS is not None:
            self._mask_BS = self._mask_BS[list(rows)]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As `reorder_cache`, for the same number of rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Only `repeats=1` is possible: rows are fixed when the session opens."""
        if repeats != 1 and self._size is not None:
            raise ConfigError("a distributed cache cannot change its number of rows")

    def activate_past_recording(self) -> None:
        """Nothing to do: servers keep every position, so that any rollback is possible."""

    def reset(self) -> None:
        """Start over with the same rows."""
        if self._size is not None:
            self._size = self._size[0], 0
            self._mask_BS = None

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first step."""
        return self.num_rows or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a step has gone through."""
        return self._size is not None

    @property
    def is_croppable(self) -> bool:
        """Any rollback is possible."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A remote call cannot be compiled."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """One full-attention layer, as far as masks are concerned."""
        return [False]

    @property
    def max_batch_size(self) -> int:
        """Rows of the batch."""
        return self.num_rows

    def __len__(self) -> int:
        return 1
