"""Where the device is the host nothing is copied; `tests/gpu` has the rest."""

from __future__ import annotations

from array import array

import pytest
import torch

from planetserve.engine.pinned_copy import integers, to_device, to_host

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_is_copied():
    tensor = torch.arange(6.0)
    assert to_device(tensor, CPU) is tensor
    assert to_host(tensor) is tensor


@pytest.mark.parametrize(("code", "dtype"), [("i", torch.int32), ("q", torch.int64)])
def test_integers_keep_their_width_and_their_memory(code, dtype):
    numbers = array(code, [3, -1, 7])
    tensor = integers(numbers, CPU)
    assert tensor.dtype == dtype
    assert tensor.tolist() == [3, -1, 7]
    numbers[1] = 5
    assert tensor[1] == 5
