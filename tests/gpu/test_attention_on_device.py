"""Attention by torch's kernel for CUDA gives what the reference gives, and is chosen there."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from planetserve.engine.attention_selector import (
    MIN_PAGES,
    TOLERANCE,
    best_backend,
    largest_error,
)
from planetserve.engine.pinned_copy import integers, to_device, to_host
from planetserve.engine.sdpa import SdpaBackend
from planetserve.engine.varlen_attention import VarlenBackend
from planetserve.errors import ConfigError
from planetserve.model.span_blocks import KvShape
from planetserve.testing.scripts import random_script


@pytest.fixture
def varlen(device: torch.device) -> VarlenBackend:
    """The backend; without CUDA, or with an older torch, there is none."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("the kernel is for CUDA, from Ampere on")
    try:
        return VarlenBackend()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("width", [8, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_trial_finds_no_fault(
    dtype: torch.dtype, width: int, varlen: VarlenBackend, device: torch.device
) -> None:
    assert largest_error(varlen, device, dtype, width) <= TOLERANCE


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_random_steps_give_what_the_reference_gives(
    dtype: torch.dtype, seed: int, varlen: VarlenBackend, device: torch.device
) -> None:
    script = random_script(random.Random(seed), num_sessions=2 + 3 * seed)
    assert largest_error(varlen, device, dtype, 128, script) <= TOLERANCE


@pytest.mark.usefixtures("varlen")
def test_it_is_chosen_for_half_precision(device: torch.device) -> None:
    shapes, tokens = [KvShape(8, 128, 128)], MIN_PAGES * VarlenBackend.page_multiple
    assert isinstance(best_backend(device, torch.float16, shapes, tokens), VarlenBackend)
    assert isinstance(best_backend(device, torch.float32, shapes, tokens), SdpaBackend)


def test_copies_arrive_while_others_are_under_way(device: torch.device) -> None:
    results = []
    for number in range(20):
        sent = to_device(torch.full((512, 1024), float(number)), device)
        shift = integers(array("q", [number]), device)
        results.append(to_host(sent + shift))
    for number, result in enumerate(results):
        assert not result.is_pinned()
        assert result.device.type == "cpu"
        assert bool((result == 2 * number).all())
