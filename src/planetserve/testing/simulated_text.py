"""The texts of a simulated session, each token of which is compared with the plain model's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import torch

from planetserve.client.session_core import SessionCore
from planetserve.testing.integer_model import PlainModel, embed, next_token
from planetserve.wire.step import RowSlice, StepTable

Step = Callable[[SessionCore, StepTable, torch.Tensor, bool], Awaitable[torch.Tensor]]
"""Runs a step until it succeeds; the flag says whether the last token of each row is enough."""
Wrong = Callable[[SessionCore, str], None]
"""Called for a wrong answer."""


class SimulatedText:
    """A session's texts: one row or several, extended, rolled back, reordered, moved to a new
    ring."""

    def __init__(
        self, core: SessionCore, rng: random.Random, num_blocks: int, step: Step, wrong: Wrong
    ):
        self._step = step
        self._wrong = wrong
        self._core = core
        self._rng = rng
        self._rows = [PlainModel(num_blocks) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        self._next = [0] * len(self._rows)

    async def write(self) -> None:
        """Write some texts."""
        rng = self._rng
        prompt = rng.choice((1, 3, 20, 60, 150))
        await self._extend([[rng.randrange(90) for _ in range(prompt)] for _ in self._rows])
        for _ in range(rng.randint(3, 10)):
            reorder = None
            match rng.randrange(11):
                case 0 if len(self._rows) > 1:
                    reorder = tuple(rng.randrange(len(self._rows)) for _ in self._rows)
                case 1:
                    length = rng.randrange(len(self._rows[0].tokens))
                    for row in self._rows:
                        row.truncate(length)
                case 2:
                    await self._core.close_ring()
                case 3 | 4 | 5:
                    await asyncio.sleep(rng.choice((0.1, 1.0, 3.0, 15.0)))
                case 6:
                    await self._fork()
                case 7:
                    await self._extend([[rng.randrange(90)] * 5 for _ in self._rows])
                    continue
                case _:
                    pass
            if reorder is not None:
                self._rows = [self._rows[source].copy() for source in reorder]
                self._next = [self._next[source] for source in reorder]
            await self._extend([[token] for token in self._next], reorder)

    async def _fork(self) -> None:
        """Append one token in a copy of the session, which must not change this one."""
        core = self._core.fork()
        copy = SimulatedText(core, self._rng, 0, self._step, self._wrong)
        copy._rows, copy._next = [row.copy() for row in self._rows], list(self._next)
        try:
            await copy._extend([[self._rng.randrange(90)] for _ in copy._rows])
        finally:
            await core.release()

    async def _extend(
        self, tokens: Sequence[Sequence[int]], reorder: tuple[int, ...] | None = None
    ) -> None:
        starts = [len(row.tokens) for row in self._rows]
        table = StepTable(
            tuple(
                RowSlice(index, start, len(new))
                for index, (start, new) in enumerate(zip(starts, tokens, strict=True))
            ),
            None,
            reorder,
        )
        hidden_TD = embed([token for new in tokens for token in new])
        keep_last = self._rng.random() < 0.5
        output_TD = await self._step(self._core, table, hidden_TD, keep_last)
        expected = [row.extend(new) for row, new in zip(self._rows, tokens, strict=True)]
        offset = 0
        for index, part in enumerate(expected):
            own_TD = output_TD[offset : offset + len(part)]
            offset += len(part)
            checked = slice(-1 if keep_last else 0, None)
            if own_TD[checked].numpy().astype("int64").tolist() != part[checked].tolist():
                self._wrong(
                    self._core, f"a wrong token in row {index} of a text of {starts[index]}"
                )
            self._next[index] = next_token(own_TD[-1])
