"""Memory for weights in huge pages, where the system has them for who asks.

A decode step reads every weight once. In pages of 4 KiB the processor looks up an address
translation for every 64 cache lines, through two levels of tables in a virtual machine, and its own
prefetching stops at every page's end. Linux gives pages of 2 MiB to mappings that ask
(`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`); elsewhere asking does
nothing.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

HUGE_PAGE_BYTES = 2 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor on the CPU, of zeros so far as it has not been written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # Older kernels do not align mappings to huge pages; pages never touched take no memory.
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    start = torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr()
    offset = -start % HUGE_PAGE_BYTES
    count = math.prod(shape)
    # The tensor keeps the mapping alive.
    return torch.frombuffer(region, dtype=dtype, count=count, offset=offset).view(shape)
