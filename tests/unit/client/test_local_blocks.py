"""Blocks that run in the client: same numbers as the whole model, and steps that leave no trace
when they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from planetserve.client.hf.local_blocks import LocalBlocks, LocalEnds, LocalRows
from planetserve.errors import SessionClosed
from planetserve.model.checkpoint import Checkpoint
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice, StepTable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 blocks."""
    made = tmp_path_factory.mktemp("llama")
    make_tiny_checkpoint(made, "llama", seed=3, num_hidden_layers=4)
    return made


@pytest.fixture(scope="module")
def ends(folder: Path) -> LocalEnds:
    """Its first two blocks and its last one."""
    checkpoint = Checkpoint.open(str(folder))
    return LocalEnds(
        LocalBlocks.load(checkpoint, BlockSpan(0, 2), torch.float32),
        LocalBlocks.load(checkpoint, BlockSpan(3, 4), torch.float32),
    )


@pytest.fixture(scope="module")
def states(folder: Path) -> tuple[torch.Tensor, ...]:
    """What enters block 0, 1, 2, 3 of the whole model for two rows of ten tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    for layer in model.model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.randint(5, 90, (2, 10), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(ids)
    return tuple(seen)


def _table(*pieces: tuple[int, int, int], reorder: tuple[int, ...] | None = None) -> StepTable:
    return StepTable(tuple(RowSlice(*piece) for piece in pieces), None, reorder)


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_ragged_steps_equal_the_whole_model(
    ends: LocalEnds, states: tuple[torch.Tensor, ...]
) -> None:
    rows = LocalRows(ends, 2)
    assert rows.needs_every_output
    enter, middle = states[0], states[2]
    for pieces in ([(0, 0, 6), (1, 0, 3)], [(1, 3, 1)], [(0, 6, 1), (1, 4, 2)]):
        cut = [(row, slice(start, start + count)) for row, start, count in pieces]
        hidden_TD = torch.cat([enter[row, tokens] for row, tokens in cut])
        got = rows.run_first(_table(*pieces), hidden_TD)
        _close(got, torch.cat([middle[row, tokens] for row, tokens in cut]))
        rows.run_last(_table(*pieces), got)


def test_the_last_blocks_end_the_model(folder: Path, states: tuple[torch.Tensor, ...]) -> None:
    blocks = LocalBlocks.load(Checkpoint.open(str(folder)), BlockSpan(2, 3), torch.float32)
    rows = LocalRows(LocalEnds(None, blocks), 1)
    hidden_TD = states[2][0]
    assert rows.run_first(_table((0, 0, 10)), hidden_TD) is hidden_TD
    _close(rows.run_last(_table((0, 0, 10)), hidden_TD), states[3][0])


def test_rows_swap_copy_and_roll_back(ends: LocalEnds, states: tuple[torch.Tensor, ...]) -> None:
    rows = LocalRows(ends, 2)
    enter, middle = states[0], states[2]
    first = _table((0, 0, 5), (1, 0, 5))
    rows.run_last(first, rows.run_first(first, torch.cat([enter[0, :5], enter[1, :5]])))
    # Both rows continue what row 1 held, each with a cache of its own.
    fork = _table((0, 5, 2), (1, 5, 1), reorder=(1, 1))
    got = rows.run_first(fork, torch.cat([enter[1, 5:7], enter[1, 5:6]]))
    _close(got, torch.cat([middle[1, 5:7], middle[1, 5:6]]))
    rows.run_last(fork, got)
    back = _table((0, 3, 4), (1, 6, 1))
    got = rows.run_first(back, torch.cat([enter[1, 3:7], enter[1, 6:7]]))
    _close(got, torch.cat([middle[1, 3:7], middle[1, 6:7]]))


def test_a_step_that_did_not_finish_changes_nothing(
    ends: LocalEnds, states: tuple[torch.Tensor, ...]
) -> None:
    rows = LocalRows(ends, 2)
    enter, middle = states[0], states[2]
    first = _table((0, 0, 5), (1, 0, 5))
    rows.run_last(first, rows.run_first(first, torch.cat([enter[0, :5], enter[1, :5]])))
    swap = _table((0, 5, 1), (1, 5, 1), reorder=(1, 0))
    hidden_TD = torch.cat([enter[1, 5:6], enter[0, 5:6]])
    for _ in range(3):  # sent again after a failure, rows must not be swapped twice
        got = rows.run_first(swap, hidden_TD)
        _close(got, torch.cat([middle[1, 5:6], middle[0, 5:6]]))
    restart = _table((0, 0, 10))
    _close(rows.run_first(restart, enter[0]), middle[0])


def test_a_gap_is_refused(ends: LocalEnds, states: tuple[torch.Tensor, ...]) -> None:
    rows = LocalRows(ends, 1)
    with pytest.raises(SessionClosed, match="open another session"):
        rows.run_first(_table((0, 4, 1)), states[0][0, 4:5])


def test_outputs_take_part_in_autograd(ends: LocalEnds, states: tuple[torch.Tensor, ...]) -> None:
    got = LocalRows(ends, 1).run_first(_table((0, 0, 3)), states[0][0, :3])
    weight = torch.ones(got.shape[1], requires_grad=True)
    (got * weight).sum().backward()
    assert weight.grad is not None
