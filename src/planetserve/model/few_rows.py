"""Products of a few rows with a weight in PyTorch's own layout, on a CPU.

For a client's head, whose weight users may edit, tie, cast, train and save, so it must not have a
second form that could differ. One kernel (`native/rows.inc`) reads it in place, once for all rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from planetserve.model.linear_backends import time_all, timed_part
from planetserve.native import library, memory

MAX_ROWS = 16
"""Maximum rows; with more, PyTorch's own product is about as fast."""
_TIMED_ROWS = (1, 4, 8, MAX_ROWS)
"""Numbers of rows that are timed; each also represents those between it and the one before."""


def has_kernel(weight_OI: torch.Tensor) -> bool:
    """Whether there is a kernel for this weight."""
    kernels = library.kernels()
    return (
        kernels is not None
        and kernels.reads_plain_weights
        and weight_OI.dtype in kernels.dtypes
        and weight_OI.device.type == "cpu"
        and weight_OI.is_contiguous()
    )


@torch.inference_mode()
def faster_rows(weight_OI: torch.Tensor) -> frozenset[int]:
    """The numbers of rows with which the kernel beats PyTorch's own product, timed.

    Which is faster depends on the machine, the dtype and the number of rows.
    """
    if not has_kernel(weight_OI):
        return frozenset()
    part_OI = timed_part(weight_OI.detach())
    with memory.apart():
        plain, kernel = time_all(
            [lambda x: F.linear(x, part_OI), lambda x: linear(x, part_OI)], part_OI, _TIMED_ROWS
        )
    faster: set[int] = set()
    least = 1
    for most, plain_s, kernel_s in zip(_TIMED_ROWS, plain, kernel, strict=True):
        if kernel_s < plain_s:
            faster.update(range(least, most + 1))
        least = most + 1
    return frozenset(faster)


def linear(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear`, by the kernel if there is one for these tensors. Builds no graph."""
    kernels = library.kernels()
    if (
        kernels is None
        or not has_kernel(weight_OI)
        or not 0 < len(x_NI) <= MAX_ROWS
        or x_NI.dtype is not weight_OI.dtype
        or x_NI.shape[1] != weight_OI.shape[1]
        or not (bias_O is None or (bias_O.dtype is x_NI.dtype and bias_O.is_contiguous()))
    ):
        return F.linear(x_NI, weight_OI, bias_O)
    return kernels.linear_rows(x_NI.contiguous(), weight_OI, bias_O)
