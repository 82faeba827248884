"""Memory that loading has freed goes back to the system at once.

While a span is loaded and packed, every weight is held twice for a moment. glibc keeps most of what
is freed then: once a block of some size has been freed it takes the next ones of that size from its
heap, and gives of a heap only the end back. A server would hold its weights almost twice for good.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LOADING_BYTES = 128 << 10
_SERVING_BYTES = 32 << 20
"""What glibc's own rule ends at: activations are taken from the heap, again and again."""


@contextlib.contextmanager
def returning_freed_memory() -> Iterator[None]:
    """While this is entered, give every large block a mapping of its own. Elsewhere than with glibc
    it does nothing.
    """
    library = ctypes.CDLL(None)
    set_option = getattr(library, "mallopt", None)
    trim = getattr(library, "malloc_trim", None)
    if set_option is None or trim is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, _LOADING_BYTES)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _SERVING_BYTES)
        set_option(_M_TRIM_THRESHOLD, 2 * _SERVING_BYTES)
        trim(0)
