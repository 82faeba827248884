"""What a step must be before any server hears of it: a client's mistake costs servers nothing."""

from __future__ import annotations

import torch

from planetserve.errors import ConfigError
from planetserve.tensors import is_finite
from planetserve.wire.step import MAX_ROWS, RowSlice, StepTable


def table_by_hand(
    inputs_BTD: torch.Tensor, hypo_ids: torch.Tensor | None, lengths: tuple[int, ...]
) -> StepTable:
    """The table of a step made by hand: it appends `inputs_BTD` to rows of these `lengths` (none:
    they are new).

    Raises:
        ConfigError: the inputs are no hidden states, or `hypo_ids` names a row that is not there.
    """
    if not isinstance(inputs_BTD, torch.Tensor) or inputs_BTD.dim() != 3 or not inputs_BTD.numel():
        raise ConfigError("step() takes one tensor [batch, tokens, hidden] of at least one token")
    num_rows, num_tokens, _ = inputs_BTD.shape
    lengths = lengths or (0,) * num_rows
    reorder = None if hypo_ids is None else tuple(int(row) for row in hypo_ids)
    if reorder is not None:
        if len(reorder) != num_rows or not all(0 <= row < len(lengths) for row in reorder):
            raise ConfigError(
                f"hypo_ids must name, for each of {num_rows} rows, one of the {len(lengths)} rows "
                f"that are there; got {list(reorder)}"
            )
        lengths = tuple(lengths[row] for row in reorder)
    else:
        _check_batch(num_rows, len(lengths))
    rows = tuple(RowSlice(row, lengths[row], num_tokens) for row in range(num_rows))
    return StepTable(rows, None, reorder)


def check_step(num_rows: int, hidden_TD: torch.Tensor, num_held: int, hidden_size: int) -> None:
    """Refuse a step that does not fit the model, or a session of `num_held` rows (0: a new one).

    Raises:
        ConfigError: it does not.
    """
    if hidden_TD.shape[-1] != hidden_size or not hidden_TD.is_floating_point():
        raise ConfigError(
            f"hidden states are {hidden_size} floating-point numbers for each token, got "
            f"{hidden_TD.shape[-1]} of {hidden_TD.dtype}"
        )
    if not is_finite(hidden_TD):
        raise ConfigError("hidden states that are no finite numbers cannot go through the blocks")
    if num_held:
        _check_batch(num_rows, num_held)
    if num_rows > MAX_ROWS:
        raise ConfigError(f"a batch of {num_rows} rows is over the limit of {MAX_ROWS}")


def _check_batch(num_rows: int, num_held: int) -> None:
    if num_rows != num_held:
        raise ConfigError(
            f"this session holds a batch of {num_held}, got {num_rows} rows; open another session"
        )
