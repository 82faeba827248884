"""glibc settings that limit the freed memory that a server's process keeps.

While a span is loaded and packed, every weight is in memory twice for a moment. glibc keeps most of
what is freed then: after a block of some size has been freed, it takes the next ones of that size
from its heap, and of a heap it returns only the end. So a server would permanently hold almost
twice its weights.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LOADING_BYTES = 128 << 10
_SERVING_BYTES = 32 << 20
"""Size in bytes at which glibc's own rule ends; activations are taken from the heap repeatedly."""


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


def share_one_arena() -> None:
    """Have threads that start from now on allocate from one heap, where they can with glibc.

    By default each has a heap of its own, and what the event loop has freed there (frames, each as
    large as a step's hidden states) does not serve the engine thread's next pass.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)
