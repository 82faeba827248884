"""Memory while weights are loaded: what is freed is gone, what is not written takes none."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from planetserve.engine.kv_cache import PagedKvCache
from planetserve.native import memory

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="no /proc to read memory from")

MIB = 1 << 20


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+)", STATUS.read_text())
    assert found is not None
    return int(found.group(1)) * 1024


WHILE_LOADING = """
import re, torch
from pathlib import Path
from planetserve.model.malloc_tuning import returning_freed_memory
def resident_mib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
del [torch.ones(1 << 21)][:]  # from now on glibc would take such blocks from its heap
with returning_freed_memory():
    before = resident_mib()
    plain, small = [], []
    for _ in range(40):
        plain.append(torch.ones(1 << 18))
        small.append(torch.ones(100))
    held = resident_mib() - before
    del plain
    # The small ones lie between them, and stay.
    print(held > 30, resident_mib() - before < 8, len(small))
"""


def test_tensors_that_are_freed_while_loading_give_their_memory_back():
    # A process of its own: what other tests have freed lies in this one's heap.
    code = [sys.executable, "-W", "ignore", "-c", WHILE_LOADING]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "40"]


def test_pages_of_the_cache_take_memory_when_they_are_written():
    cache = PagedKvCache(num_layers=1, num_pages=1000, page_size=16)
    key = torch.ones(16, 8, 64)
    before = resident()
    pages = cache.write(0, torch.arange(16), key, key)
    # All pages together are 62 MiB.
    assert resident() - before < 8 * MIB
    assert pages.keys_PSKD.shape == (1001, 16, 8, 64)
    assert bool((pages.keys_PSKD[0] == 1).all())
    assert not pages.values_PSKD[1:].any()


def test_weights_share_regions_and_never_overlap():
    before = resident()
    weights = [memory.empty((500, 1200), torch.float32).fill_(i) for i in range(20)]
    assert resident() - before < 60 * MIB
    assert all(bool((w == i).all()) for i, w in enumerate(weights))
    starts = sorted((w.data_ptr(), w.nbytes) for w in weights)
    ends = [start + size for start, size in starts]
    assert all(end <= start for end, (start, _) in zip(ends, starts[1:], strict=False))
    assert all(w.data_ptr() % 64 == 0 for w in weights)


def test_a_weight_larger_than_a_region_gets_one_of_its_own():
    large = memory.empty((40 * MIB // 4,), torch.float32)
    assert large.nbytes == 40 * MIB
    assert not large[-1:].any()
    assert memory.empty((0, 3), torch.float32).shape == (0, 3)


def test_trials_leave_no_holes():
    first = memory.empty((1000,), torch.float32)
    with memory.apart():
        trial = memory.empty((1000,), torch.float32)
    second = memory.empty((1000,), torch.float32)
    assert 0 < second.data_ptr() - first.data_ptr() <= 4096
    assert abs(trial.data_ptr() - first.data_ptr()) > 4096


HEAP_OF_A_THREAD = """
import ctypes, re, threading
from pathlib import Path
from planetserve.model.malloc_tuning import share_one_arena
share_one_arena()
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
found = []
thread = threading.Thread(target=lambda: found.append(malloc(50000)))
thread.start()
thread.join()
heap = re.search(r"^(\\w+)-(\\w+) .*\\[heap\\]$", Path("/proc/self/maps").read_text(), re.MULTILINE)
print(int(heap[1], 16) <= found[0] < int(heap[2], 16))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has heaps per thread")
def test_threads_can_share_one_heap():
    code = [sys.executable, "-c", HEAP_OF_A_THREAD]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    code[-1] = HEAP_OF_A_THREAD.replace("share_one_arena()\n", "", 1)
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
