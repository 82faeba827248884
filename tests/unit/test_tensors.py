"""Checks of tensors that came from a peer."""

from __future__ import annotations

import pytest
import torch

from planetserve.tensors import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_found(dtype):
    hidden_TD = torch.randn(3, 8).to(dtype)
    assert is_finite(hidden_TD)
    for bad in (float("nan"), float("inf"), -float("inf")):
        changed_TD = hidden_TD.clone()
        changed_TD[1, 2] = bad
        assert not is_finite(changed_TD)
    changed_TD[0, 0] = float("inf")  # beside the other infinity
    assert not is_finite(changed_TD)


def test_numbers_whose_sum_overflows_are_finite():
    assert is_finite(torch.full((2, 4), 3e38))
    assert is_finite(torch.full((2, 4), 65504.0, dtype=torch.float16))
