"""Rotary embeddings from a table are those that the model's own code computes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from planetserve.engine.rotary_table import MOST_POSITIONS, RotaryTable

WIDTH = 32


class Counting(LlamaRotaryEmbedding):
    """Counts how often it is asked."""

    calls = 0

    def forward(self, x, position_ids):
        self.calls += 1
        return super().forward(x, position_ids)


@pytest.fixture
def rotary():
    return Counting(LlamaConfig(hidden_size=WIDTH, num_attention_heads=2))


def check(rotary, table, positions: list[int], dtype: torch.dtype) -> None:
    positions_T = torch.tensor(positions)
    hidden_TD = torch.zeros(len(positions), WIDTH, dtype=dtype)
    wanted = LlamaRotaryEmbedding.forward(rotary, hidden_TD[None], positions_T[None])
    for own, expected in zip(table(hidden_TD, positions_T), wanted, strict=True):
        assert own.dtype == dtype
        assert own.is_contiguous()
        torch.testing.assert_close(own, expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_what_the_model_computes(rotary, dtype):
    table = RotaryTable(rotary)
    check(rotary, table, [0], dtype)
    check(rotary, table, [7, 3, 3, 1000], dtype)
    check(rotary, table, [1023], dtype)
    assert rotary.calls == 1
    check(rotary, table, [1024], dtype)
    check(rotary, table, [5], dtype)
    assert rotary.calls == 2


def test_another_dtype_gets_another_table(rotary):
    table = RotaryTable(rotary)
    check(rotary, table, [1, 2], torch.float32)
    check(rotary, table, [1, 2], torch.bfloat16)
    check(rotary, table, [3], torch.float32)


def test_positions_out_of_the_table_are_computed(rotary):
    """A client may name any position; the table stays bounded."""
    table = RotaryTable(rotary)
    check(rotary, table, [MOST_POSITIONS], torch.float32)
    check(rotary, table, [-1], torch.float32)
    check(rotary, table, [4, 1 << 24], torch.float32)
    check(rotary, table, [MOST_POSITIONS - 1], torch.float32)
    assert rotary.calls == 4
    check(rotary, table, [0, 1], torch.float32)
    assert rotary.calls == 4
