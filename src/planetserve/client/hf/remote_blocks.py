"""What stands where the decoder layers were: turns a model's forward call into a ragged step.

`on_call` sees the arguments of the decoder's forward (mask, positions, cache); `__call__` then gets
the hidden states that would have entered the first layer and returns those that would have left
the last. Padding never travels: rows are sent as their real tokens and scattered back. Nor do
copies: rows that begin alike (the beams of a search, several answers to one prompt) are computed
once and forked with the next step, so that servers keep one set of pages for what they share.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planetserve.client.hf.remote_cache import RemoteCache, usable_cache
from planetserve.client.session import InferenceSession
from planetserve.errors import ConfigError
from planetserve.tensors import tensor_bytes
from planetserve.wire.step import MAX_POSITION, RowSlice, StepTable

logger = logging.getLogger(__name__)

RIGHT_PADDED = (
    "attention_mask ends with padding, and what comes after padding cannot be generated; pad on "
    "the left (tokenizer.padding_side = 'left')"
)

OTHER_MASK = (
    "attention_mask must go over all columns of the cache and the input, and leave out of the "
    "cache what was left out when it was filled; to change that, start over without past_key_values"
)


@dataclass(slots=True)
class _Call:
    """One forward call in flight on this thread."""

    mask_BS: torch.Tensor | None
    positions_BT: torch.Tensor | None
    ids_BT: torch.Tensor | None
    cache: RemoteCache | None
    keep_last: bool
    """Whether only the output of each row's last token is needed."""


class RemoteBlocks:
    """The remote layers of one model.

    Args:
        new_session: makes a session for a forward pass that brings no cache; its argument is the
            number of tokens per row to lease.
        keep: told of each session whose cache somebody keeps when it is about to be used.
    """

    def __init__(
        self,
        new_session: Callable[[int], InferenceSession],
        keep: Callable[[InferenceSession], None],
    ):
        self._new_session = new_session
        self._keep = keep
        self._thread = threading.local()
        self._has_told_of_padding = False

    def on_outer_call(self, arguments: Mapping[str, Any], logits_to_keep: object) -> None:
        """Note what this thread's next call of the whole model is given.

        A multimodal model gives its decoder embeddings in the place of tokens, and a mask for each
        kind of layer made of the one it got: its text is attended to causally.

        Args:
            arguments: of the model's `forward`, by name.
            logits_to_keep: how many logits of each row are needed (0: all).
        """
        self._thread.keep_last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        self._thread.given = {name: arguments.get(name) for name in ("input_ids", "attention_mask")}

    def forget(self) -> None:
        """The call that this thread has announced is over, also if it never came to the layers."""
        self._thread.keep_last = False
        self._thread.given = None
        self._thread.call = None

    def on_call(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Look at, and where needed complete, the decoder's arguments.

        Raises:
            ConfigError: a mask or cache that cannot be distributed.
        """
        given = getattr(self._thread, "given", None) or {}
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = given.get("input_ids")
        if ids is not None and (not isinstance(ids, torch.Tensor) or ids.dim() != 2):
            raise ConfigError("input_ids must be a 2D tensor [batch, tokens]")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):
            mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise ConfigError("attention_mask must be a 2D tensor [batch, tokens] of 0 and 1")
        positions = kwargs.get("position_ids")
        if positions is not None and positions.dim() == 3:
            positions = _one_plane(positions)
        if positions is not None and positions.dim() != 2:
            raise ConfigError("position_ids must be a 2D tensor [batch, tokens]")
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, RemoteCache):
            cache = usable_cache(cache, lambda: self._new_session(0))
        if cache is None and kwargs.get("use_cache") is not False and "past_key_values" in kwargs:
            inputs = kwargs.get("inputs_embeds") if ids is None else ids
            if inputs is not None:
                cache = RemoteCache(self._new_session(int(inputs.shape[1])))
                cache.is_kept = True
                kwargs = {**kwargs, "past_key_values": cache}
        if mask is None and cache is None and _is_packed(positions):
            raise ConfigError(
                "position_ids of several texts in one row, which Hugging Face attends to apart, "
                "are not supported; give each text a row of its own"
            )
        keep_last = bool(getattr(self._thread, "keep_last", False))
        self._thread.call = _Call(mask, positions, ids, cache, keep_last)
        return kwargs

    def __call__(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Run the remote layers on `[batch, tokens, hidden]`; padding comes back as zeros."""
        call: _Call | None = getattr(self._thread, "call", None)
        if call is None:
            raise ConfigError("call the distributed model itself, not its decoder layers")
        self._thread.call = None
        if call.cache is not None:
            if call.cache.is_kept:
                self._keep(call.cache.session)
            return self._run(call.cache, call, hidden_BTD)
        session = self._new_session(hidden_BTD.shape[1])
        try:
            return self._run(RemoteCache(session, keep_session=True), call, hidden_BTD)
        finally:
            session.close()

    def _run(self, cache: RemoteCache, call: _Call, hidden_BTD: torch.Tensor) -> torch.Tensor:
        cache.begin()
        num_held = cache.num_fed_again
        if num_held:
            output_BTD = torch.zeros_like(hidden_BTD)
            output_BTD[:, num_held:] = self._run_new(cache, call, hidden_BTD[:, num_held:])
            return output_BTD
        return self._run_new(cache, call, hidden_BTD)

    def _run_new(self, cache: RemoteCache, call: _Call, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The part of a call that brings columns the cache does not hold yet."""
        num_rows, num_tokens, width = hidden_BTD.shape
        if cache.is_plain(call.mask_BS, num_rows, num_tokens):
            columns_BT = None  # nearly every step
        elif cache.fits(call.mask_BS, num_tokens):
            columns_BT = _padded_columns(call.mask_BS, num_rows, num_tokens)
        else:
            raise ConfigError(OTHER_MASK)
        counts = [num_tokens] * num_rows if columns_BT is None else columns_BT.sum(dim=1).tolist()
        starts = cache.row_lengths() or (0,) * num_rows
        if len(starts) != num_rows:
            raise ConfigError(f"the cache holds {len(starts)} rows, the input has {num_rows}")
        if columns_BT is not None and call.keep_last:
            # A row without any token yet is one on its way through its left padding.
            begun = torch.tensor(starts) + torch.tensor(counts) > 0
            if bool((begun & ~columns_BT[:, -1]).any()):
                raise ConfigError(RIGHT_PADDED)
        rows = tuple(
            RowSlice(row, start, count)
            for row, (start, count) in enumerate(zip(starts, counts, strict=True))
            if count
        )
        if not rows:
            raise ConfigError("the input has no token that counts: none at all, or all are masked")
        positions = _explicit_positions(call.positions_BT, columns_BT, cache, rows)
        device = hidden_BTD.device
        local_BTD = hidden_BTD.detach().cpu()
        keep_last = call.keep_last
        table = StepTable(rows, positions, cache.reorder)
        sources = None if any(starts) else _twins(local_BTD, columns_BT, table)
        if sources is None:
            flat_TD = local_BTD.reshape(-1, width)
            hidden_TD = flat_TD if columns_BT is None else local_BTD[columns_BT]
            output_TD = cache.session.run(num_rows, table, hidden_TD, keep_last=keep_last)
            cache.commit(num_rows, num_tokens, columns_BT, call.ids_BT)
        else:
            table, chosen_TD = _without_twins(local_BTD, columns_BT, table, sources)
            chosen_TD = cache.session.run(num_rows, table, chosen_TD, keep_last=keep_last)
            counts = [piece.num_tokens for piece in table.rows]
            by_row = dict(zip((p.row for p in table.rows), chosen_TD.split(counts), strict=True))
            output_TD = torch.cat([by_row[source] for source in sources])
            cache.commit(num_rows, num_tokens, columns_BT, call.ids_BT)
            cache.reorder = sources
        output_TD = output_TD.to(device)
        if columns_BT is None:
            return output_TD.view(num_rows, num_tokens, width)
        if not keep_last and not self._has_told_of_padding:
            self._has_told_of_padding = True
            logger.warning(
                "attention_mask leaves columns out: they are not computed, and what is returned "
                "for them is no output of the model"
            )
        output_BTD = torch.zeros_like(hidden_BTD)
        output_BTD[columns_BT.to(device)] = output_TD
        return output_BTD


def _twins(
    hidden_BTD: torch.Tensor, columns_BT: torch.Tensor | None, table: StepTable
) -> tuple[int, ...] | None:
    """For each row of a first step the first row that is the same; None if no two are."""
    num_rows = len(hidden_BTD)
    if num_rows == 1 or len(table.rows) < num_rows:
        return None
    sources: list[int] = []
    # Rows that differ mostly do so in their last token; only the others are compared whole.
    alike: dict[bytes, list[int]] = {}
    offset = 0
    positions = []
    for row, piece in enumerate(table.rows):
        end = offset + piece.num_tokens
        positions.append(table.positions and table.positions[offset:end])
        offset = end
        others = alike.setdefault(bytes(tensor_bytes(hidden_BTD[row, -1])), [])
        same = (
            other
            for other in others
            if positions[other] == positions[row]
            and (columns_BT is None or torch.equal(columns_BT[other], columns_BT[row]))
            and torch.equal(hidden_BTD[other], hidden_BTD[row])
        )
        sources.append(next(same, row))
        if sources[-1] == row:
            others.append(row)
    return tuple(sources) if len(set(sources)) < num_rows else None


def _without_twins(
    hidden_BTD: torch.Tensor,
    columns_BT: torch.Tensor | None,
    table: StepTable,
    sources: tuple[int, ...],
) -> tuple[StepTable, torch.Tensor]:
    """The step for the rows that are their own source."""
    rows, hidden, offset = [], [], 0
    positions: list[int] = []
    for piece in table.rows:
        end = offset + piece.num_tokens
        if sources[piece.row] == piece.row:
            rows.append(piece)
            row_TD = hidden_BTD[piece.row]
            hidden.append(row_TD if columns_BT is None else row_TD[columns_BT[piece.row]])
            positions += (table.positions or ())[offset:end]
        offset = end
    return StepTable(tuple(rows), tuple(positions) or None), torch.cat(hidden)


def _one_plane(positions_PBT: torch.Tensor) -> torch.Tensor:
    """The positions of text, which are the same in time, height and width."""
    if bool((positions_PBT != positions_PBT[:1]).any()):
        raise ConfigError(
            "position_ids that differ in time, height and width are those of images, which are not "
            "supported; give text only"
        )
    return positions_PBT[0]


def _is_packed(positions_BT: torch.Tensor | None) -> bool:
    """Whether Hugging Face takes rows with these positions for several texts each."""
    return positions_BT is not None and bool((positions_BT.diff(dim=-1) != 1).any())


def _padded_columns(
    mask_BS: torch.Tensor | None, num_rows: int, num_tokens: int
) -> torch.Tensor | None:
    """Which of the new columns hold tokens; None if all do."""
    if mask_BS is None:
        return None
    if mask_BS.shape[0] != num_rows or mask_BS.shape[1] < num_tokens:
        raise ConfigError(
            f"attention_mask of shape {tuple(mask_BS.shape)} does not fit an input of "
            f"{num_rows} rows and {num_tokens} tokens"
        )
    columns_BT = mask_BS[:, -num_tokens:].to(device="cpu", dtype=torch.bool)
    return None if bool(columns_BT.all()) else columns_BT


def _explicit_positions(
    positions_BT: torch.Tensor | None,
    columns_BT: torch.Tensor | None,
    cache: RemoteCache,
    rows: tuple[RowSlice, ...],
) -> tuple[int, ...] | None:
    """Rotary positions of the real tokens, or None when each is its place in the KV cache."""
    num_tokens = rows[0].num_tokens if columns_BT is None else columns_BT.shape[1]
    if positions_BT is None:
        if columns_BT is None and not cache.is_padded:
            return None
        # What a model does without position_ids: it counts columns, padding included.
        past = cache.num_columns
        positions_BT = torch.arange(past, past + num_tokens)[None]
    num_rows = len(rows) if columns_BT is None else len(columns_BT)
    if positions_BT.shape[0] not in (1, num_rows) or positions_BT.shape[1] < num_tokens:
        raise ConfigError(
            f"position_ids of shape {tuple(positions_BT.shape)}, given or counted from an "
            f"attention_mask, do not fit an input of {num_rows} rows and {num_tokens} tokens"
        )
    if columns_BT is None:
        by_row = positions_BT.tolist()
        if len(by_row) < num_rows:
            by_row *= num_rows
        wanted = [position for row in by_row for position in row[-num_tokens:]]
    else:
        positions_BT = positions_BT[:, -num_tokens:].cpu().expand(num_rows, -1)
        wanted = positions_BT[columns_BT].tolist()
    if not all(0 <= position <= MAX_POSITION for position in wanted):
        raise ConfigError(f"position_ids must be between 0 and {MAX_POSITION}")
    natural = [position for piece in rows for position in range(piece.start, piece.end)]
    return None if wanted == natural else tuple(wanted)
