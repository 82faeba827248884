"""The device of these tests: CUDA, or what PLANETSERVE_TEST_DEVICE names (cpu and mps too)."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where spans run; without CUDA the test is skipped, unless another device was named."""
    name = os.environ.get("PLANETSERVE_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA here; PLANETSERVE_TEST_DEVICE=cpu runs the same tests on the CPU")
    return torch.device(name)
