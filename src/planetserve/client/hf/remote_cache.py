"""The Hugging Face cache of a distributed model: bookkeeping without keys and values.

`generate()` sees a `Cache` whose length, crop and reorder work; they become fields of the next step
to the servers, so that a rollback or a reorder costs no round trip.

Hugging Face counts *columns*, padding included; servers hold only the real tokens of each row. The
cache keeps the mask of all columns so far, and so knows how many tokens each row has. While there
is no padding, the number of columns is enough.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from transformers import Cache, DynamicCache, StaticCache
from typing_extensions import override

from planetserve.client.session import InferenceSession
from planetserve.errors import ConfigError


class RemoteCache(Cache):
    """Represents the KV cache of one `InferenceSession`.

    The session is closed when the cache is garbage-collected, unless `keep_session`. With
    `keep_ids` the cache knows which tokens its rows hold, so that a text can be compared with them.
    A copy has a session of its own, whose first step computes the rows again.
    """

    def __init__(
        self, session: InferenceSession, *, keep_session: bool = False, keep_ids: bool = False
    ):
        super().__init__(layers=[])
        self.session = session
        self._size: tuple[int, int] | None = None
        """Rows and columns; None before the first step."""
        self._mask_BS: torch.Tensor | None = None
        """Bool `[rows, columns]`: which columns hold real tokens. None while all do."""
        self._ids_BS: torch.Tensor | None = None
        """Token ids `[rows, columns]` if they are kept; -1 where they are unknown."""
        self._keep_ids = keep_ids
        self.is_kept = False
        """Whether the caller keeps this cache and may continue it."""
        self.num_fed_again = 0
        """Number of columns that the next call of the model feeds although the rows hold them."""
        self.reorder: tuple[int, ...] | None = None
        """Row reordering that the next step must carry."""
        self._steps_before: int | None = None
        """Number of steps of the session before the one that runs or failed."""
        if not keep_session:
            weakref.finalize(self, session.close)

    @classmethod
    def replace(cls, given: Cache, session: InferenceSession) -> RemoteCache:
        """Turn an empty cache of Hugging Face's own into a `RemoteCache`, in place, since its owner
        continues to use the object."""
        given.__dict__.clear()
        given.__class__ = cls
        cls.__init__(given, session)
        given.is_kept = True
        return given

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 before the first step."""
        return 0 if self._size is None else self._size[0]

    @property
    def num_columns(self) -> int:
        """Number of columns that the rows hold."""
        return 0 if self._size is None else self._size[1]

    @property
    def is_padded(self) -> bool:
        """Whether some column of some row holds no token."""
        return self._mask_BS is not None

    def row_lengths(self) -> tuple[int, ...]:
        """Real tokens per row, after pending crops and reorders."""
        if self._mask_BS is not None:
            return tuple(self._mask_BS.sum(dim=1).tolist())
        return () if self._size is None else (self._size[1],) * self._size[0]

    def is_plain(self, mask_BS: torch.Tensor | None, num_rows: int, num_new: int) -> bool:
        """Whether neither the cache nor this mask, over the cache and `num_new` columns, has
        padding."""
        if mask_BS is None or self._mask_BS is not None:
            return mask_BS is None and self._mask_BS is None
        return mask_BS.shape == (num_rows, self.num_columns + num_new) and bool(mask_BS.all())

    def fits(self, mask_BS: torch.Tensor | None, num_new: int) -> bool:
        """Whether this mask, over the rows and `num_new` more columns, matches what they hold."""
        past = self.num_columns
        if mask_BS is None or not past:
            return not (past and self.is_padded)
        if mask_BS.shape[0] != self.num_rows:
            return True  # told of as another batch
        held_BS = mask_BS[:, :past].cpu().bool()
        if mask_BS.shape[1] < past + num_new:
            return False
        return bool(held_BS.all() if self._mask_BS is None else held_BS.equal(self._mask_BS))

    def catch_up(self) -> None:
        """Before a step, check whether an earlier one succeeded whose answer never arrived
        (Ctrl-C). Then servers have applied its reorder already; its tokens will be rolled back."""
        if self._steps_before is not None and self._steps_before != self.session.num_steps:
            self.reorder = None
        self._steps_before = None

    def begin(self) -> None:
        """A step is about to start."""
        self.catch_up()
        self._steps_before = self.session.num_steps

    def commit(
        self,
        num_rows: int,
        num_columns: int,
        mask_BT: torch.Tensor | None,
        ids_BT: torch.Tensor | None = None,
    ) -> None:
        """Record a step: these columns (where the mask is True, or all) now hold tokens, the last
        ones of `ids_BT`."""
        self.reorder = None
        self.num_fed_again = 0
        self._steps_before = None
        past = self.num_columns
        self._size = num_rows, past + num_columns
        if self._keep_ids:
            if ids_BT is None:
                ids_BT = torch.full((num_rows, num_columns), -1)
            ids_BT = ids_BT[:, -num_columns:].cpu()
            old_ids_BS = self._ids_BS
            self._ids_BS = ids_BT if old_ids_BS is None else torch.cat([old_ids_BS, ids_BT], dim=1)
        if self._mask_BS is None and mask_BT is None:
            return
        old_BS, new_BT = self._mask_BS, mask_BT
        if old_BS is None:
            old_BS = torch.ones(num_rows, past, dtype=torch.bool)
        if new_BT is None:
            new_BT = torch.ones(num_rows, num_columns, dtype=torch.bool)
        self._mask_BS = torch.cat([old_BS, new_BT], dim=1)

    def keep_common(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> None:
        """Keep the common prefix of the rows and the text `ids_BS`, without its last column.

        Each row of the text continues the row that holds the longest prefix of it. Whatever
        happened to the rows before (beams, rejected tokens, an interrupted call), they then equal
        a fresh cache after as many columns of this text.
        """
        self.catch_up()
        self.num_fed_again = 0
        held_BS, num_columns = self._ids_BS, min(self.num_columns, ids_BS.shape[1] - 1)
        if held_BS is None or not num_columns:
            self.crop(-self.num_columns)
            return
        held_BS, wanted_BS = held_BS[:, :num_columns], ids_BS[:, :num_columns].cpu()
        counts_BS = mask_BS[:, :num_columns].cpu().bool()
        # What is masked has no token, whatever its id is.
        wanted_BS = wanted_BS.masked_fill(~counts_BS, -2)
        if self._mask_BS is not None:
            held_BS = held_BS.masked_fill(~self._mask_BS[:, :num_columns], -2)
        sources, common = [], num_columns
        for row, wanted_S in enumerate(wanted_BS):
            lengths = (held_BS == wanted_S).cumprod(dim=1).sum(dim=1)
            longest = int(lengths.max())
            # A row that may stay where it is does.
            source = row if int(lengths[row]) == longest else int(lengths.argmax())
            sources.append(source)
            common = min(common, longest)
        if common and sources != list(range(len(sources))):
            self.reorder_cache(torch.tensor(sources))
        self.crop(common - self.num_columns)

    def feed_again(self) -> None:
        """Expect the next call of the model to feed also what the rows hold, as some decoding
        methods always do."""
        self.num_fed_again = self.num_columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns so far."""
        return self.num_columns - self.num_fed_again

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Key-value length and offset, as a full-attention layer reports them."""
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No maximum of its own."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum of its own."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop columns from the end.

        Negative: remove this many. Positive: keep this many (the older meaning of the argument).
        """
        if self._size is None or not tokens_to_remove:
            return
        num_rows, num_columns = self._size
        self._size = num_rows, len(range(num_columns)[:tokens_to_remove])
        if self._mask_BS is not None:
            self._mask_BS = self._mask_BS[:, :tokens_to_remove]
        if self._ids_BS is not None:
            self._ids_BS = self._ids_BS[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row `i` continues what row `beam_idx[i]` held."""
        if self._size is None:
            return
        self.catch_up()
        rows = tuple(int(row) for row in beam_idx)
        if len(rows) != self.num_rows:
            self._take_rows(rows)
            return
        before = self.reorder or tuple(range(len(rows)))
        self.reorder = tuple(before[row] for row in rows)
        self._pick(list(rows))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self.reorder_cache(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make `repeats` rows of each."""
        self.reorder_cache(torch.arange(self.num_rows).repeat_interleave(repeats))

    def _take_rows(self, rows: Sequence[int]) -> None:
        """Fork the session: another number of rows needs another one, since servers have reserved
        memory for these."""
        before = self.reorder or range(self.num_rows)
        fork = self.session.fork([before[row] for row in rows])
        self.session.close()
        self.session, self.reorder = fork, None
        weakref.finalize(self, fork.close)
        self._size = len(rows), self.num_columns
        self._pick(list(rows))

    def _pick(self, rows: list[int]) -> None:
        if self._mask_BS is not None:
            self._mask_BS = self._mask_BS[rows]
        if self._ids_BS is not None:
            self._ids_BS = self._ids_BS[rows]

    def __deepcopy__(self, memo: dict[int, object]) -> RemoteCache:
        self.catch_up()
        fork = RemoteCache(self.session.fork(), keep_ids=self._keep_ids)
        memo[id(self)] = fork
        fork.is_kept = True
        # Tensors are replaced and never written into, so both may use them.
        fork._size, fork._mask_BS, fork._ids_BS = self._size, self._mask_BS, self._ids_BS
        fork.reorder, fork.num_fed_again = self.reorder, self.num_fed_again
        return fork

    def __copy__(self) -> RemoteCache:
        return self.__deepcopy__({})

    @override
    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a distributed cache lives on servers and cannot be pickled; keep the text instead"
        )

    @override
    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            "the cache of a distributed model holds no keys and values here; give another model a "
            "cache of its own"
        )

    def activate_past_recording(self) -> None:
        """Nothing to do: servers keep every position, so that any rollback is possible."""

    def reset(self) -> None:
        """Start over with the same rows."""
        self.crop(-self.num_columns)
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


def usable_cache(given: Any, new_session: Callable[[], InferenceSession]) -> RemoteCache:
    """Turn the `past_key_values` of a caller into a cache that servers can continue.

    Raises:
        ConfigError: it holds keys and values, or is of an unknown kind.
    """
    if isinstance(given, RemoteCache):
        return given
    if type(given) in (DynamicCache, StaticCache) and not given.get_seq_length():
        return RemoteCache.replace(given, new_session())
    raise ConfigError(
        f"past_key_values of type {type(given).__name__} cannot be used by a distributed model; "
        "leave it out, or pass an empty DynamicCache or one that this model returned"
    )
