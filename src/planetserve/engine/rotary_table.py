"""Rotary embeddings looked up by position instead of computed for every pass.

A model computes cosines and sines of its tokens' positions anew in every pass, in a dozen operators
that for one token take longer than its attention. They depend on the position alone, so they are
computed once, by the model's own code, and kept for the first `MOST_POSITIONS` positions.

Legend: T tokens, D rotated width of a head.
"""

from __future__ import annotations

import torch
from torch import nn

MOST_POSITIONS = 1 << 15
"""Maximum positions in the table; 16 MiB for a float32 head of width 64. Later ones are computed by
the model."""
_FIRST_POSITIONS = 1 << 10

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, `[T, D]`, contiguous."""


class RotaryTable:
    """What `rotary` gives, which must depend on nothing but each token's position.

    Args:
        rotary: the model's own module; called with `[1, T, hidden]` and `[1, T]` positions.
    """

    def __init__(self, rotary: nn.Module):
        self._rotary = rotary
        self._table: Rotation | None = None

    def __call__(self, hidden_TD: torch.Tensor, positions_T: torch.Tensor) -> Rotation:
        """Cosines and sines of tokens, in the dtype and on the device of `hidden_TD`."""
        if len(positions_T) == 1:
            first = last = int(positions_T)
        else:
            first, last = (int(position) for position in positions_T.aminmax())
        if first < 0 or last >= MOST_POSITIONS:
            return self._computed(hidden_TD, positions_T)
        cos_ND, sin_ND = self._reaching(hidden_TD, last)
        if first == last and len(positions_T) == 1:
            return cos_ND[first : first + 1], sin_ND[first : first + 1]
        return cos_ND[positions_T], sin_ND[positions_T]

    def _reaching(self, hidden_TD: torch.Tensor, last: int) -> Rotation:
        """A table of at least `last + 1` positions."""
        table = self._table
        is_fit = table is not None and (
            len(table[0]) > last
            and table[0].dtype == hidden_TD.dtype
            and table[0].device == hidden_TD.device
        )
        if table is None or not is_fit:
            size = _FIRST_POSITIONS
            while size <= last:
                size *= 2
            positions_N = torch.arange(size, device=hidden_TD.device)
            table = self._table = self._computed(hidden_TD, positions_N)
        return table

    def _computed(self, hidden_TD: torch.Tensor, positions_T: torch.Tensor) -> Rotation:
        cos_1TD, sin_1TD = self._rotary(hidden_TD[None], positions_T[None])
        return cos_1TD[0].contiguous(), sin_1TD[0].contiguous()
