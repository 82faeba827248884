"""Memory for weights in huge pages, where the system has them for who asks.

A decode step reads every weight once. In pages of 4 KiB the processor looks up an address
translation for every 64 cache lines, through two levels of tables in a virtual machine, and its own
prefetching stops at every page's end. Linux gives pages of 2 MiB to mappings that ask
(`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`); elsewhere asking does
nothing.

Weights share regions: one of a little over 2 MiB would take two huge pages if it had its own. A
region lives as long as any weight in it, and what of it has not been handed out takes no memory but
the rest of one huge page.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Iterator

import torch

HUGE_PAGE_BYTES = 2 << 20
_REGION_BYTES = 128 << 20
_ALIGNMENT = 64


class _Region:
    """Mapped memory that is handed out from its start to its end."""

    def __init__(self, num_bytes: int):
        # Older kernels do not align mappings to huge pages; what is never touched takes no memory.
        size = num_bytes + HUGE_PAGE_BYTES
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        start: int = torch.frombuffer(self.memory, dtype=torch.uint8, count=1).data_ptr()
        self.start: int = -start % HUGE_PAGE_BYTES
        self._next = self.start
        self._end = self.start + num_bytes

    def take(self, num_bytes: int) -> int | None:
        """Offset of memory for so many bytes; None if there is no room."""
        offset = self._next
        if offset + num_bytes > self._end:
            return None
        self._next = offset + num_bytes + -num_bytes % _ALIGNMENT
        return offset


class _Regions:
    """Hands out memory of the latest region, and makes a new one where that is full."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: _Region | None = None

    def take(self, num_bytes: int) -> tuple[mmap.mmap, int]:
        """A mapping and the offset in it of memory for so many bytes."""
        with self._lock:
            region = self._latest
            offset = None if region is None else region.take(num_bytes)
            if region is None or offset is None:
                region = self._latest = _Region(max(num_bytes, _REGION_BYTES))
                offset = region.take(num_bytes) or region.start
            return region.memory, offset

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Take memory of a region that ends with what is taken while this is entered."""
        with self._lock:
            before, self._latest = self._latest, None
        try:
            yield
        finally:
            with self._lock:
                self._latest = before


_regions = _Regions()


def apart() -> contextlib.AbstractContextManager[None]:
    """While this is entered, tensors share no memory with earlier or later ones: for trials, which
    would otherwise leave holes.
    """
    return _regions.apart()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor on the CPU, of zeros so far as it has not been written."""
    count = math.prod(shape)
    if not count or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory, offset = _regions.take(count * dtype.itemsize)
    # The tensor keeps the region alive.
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
