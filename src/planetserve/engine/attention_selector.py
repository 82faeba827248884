"""Chooses the attention backend for a device, and tries out the one that depends on the device.

What a kernel does on some GPU, driver and version of torch is not known until it has run there. So
before `varlen` is chosen, it takes a few steps of a few sessions beside the reference backend.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence

import torch

from planetserve.engine.attention import AttentionBackend, AttentionOptions
from planetserve.engine.kv_cache import PagedKvCache
from planetserve.engine.native_attention import NativeBackend
from planetserve.engine.ragged import RaggedBatch, Visibility
from planetserve.engine.sdpa import SdpaBackend
from planetserve.engine.varlen_attention import VarlenBackend, fits
from planetserve.errors import ConfigError
from planetserve.model.span_blocks import KvShape
from planetserve.native import library
from planetserve.scheduler.batch import StepRequest
from planetserve.scheduler.scheduler import Scheduler, SchedulerConfig
from planetserve.wire.step import RowSlice

logger = logging.getLogger(__name__)

MIN_PAGES = 64
"""Minimum pages of a KV cache: each session takes at least one, so fewer would admit too few
sessions."""

TOLERANCE = 0.05
_WINDOW = 100
_NUM_KV_HEADS = 2
_SHARED = 3
_SEED = 20240731

Script = Sequence[Sequence[tuple[int, int, int]]]
"""Per tick, the steps that run together: session, first position, number of tokens."""

# Prompts; steps with a chunk and a new prompt; steps alone; pages that were used before.
_SCRIPT: Script = (
    ((0, 0, 700), (1, 0, 1), (2, 0, 255)),
    ((0, 700, 1), (1, 1, 300), (2, 255, 1), (3, 0, 40)),
    ((0, 701, 1), (1, 301, 1), (2, 256, 1), (3, 40, 1)),
    ((0, 0, 30), (1, 302, 1), (2, 200, 2), (3, 41, 600)),
)


def best_backend(
    device: torch.device, dtype: torch.dtype, kv_shapes: Sequence[KvShape], cache_tokens: int
) -> AttentionBackend:
    """`varlen` on CUDA where it works, elsewhere `native` if its kernels are there, else `sdpa`.

    Args:
        device: where the span runs.
        dtype: what it computes in.
        kv_shapes: what its blocks cache.
        cache_tokens: how many tokens the KV cache is to hold.
    """
    if device.type != "cuda":
        if library.kernels() is not None:
            return NativeBackend()
        reason = "the native kernels are not there"
    elif (found := _why_not_varlen(device, dtype, kv_shapes, cache_tokens)) is None:
        backend = VarlenBackend()
        logger.info("attention backend varlen, pages of %d tokens", backend.page_multiple)
        return backend
    else:
        reason = found
    logger.info("attention backend sdpa: %s", reason)
    return SdpaBackend()


def _why_not_varlen(
    device: torch.device, dtype: torch.dtype, kv_shapes: Sequence[KvShape], cache_tokens: int
) -> str | None:
    widths = {s.key_dim for s in kv_shapes if fits(dtype, s.key_dim, s.value_dim)}
    if not widths:
        return f"varlen does not take {str(dtype).removeprefix('torch.')} heads of this width"
    page_size = VarlenBackend.page_multiple
    if cache_tokens < MIN_PAGES * page_size:
        return f"varlen needs a KV cache of at least {MIN_PAGES} pages of {page_size} tokens"
    try:
        backend = VarlenBackend()
        errors = [largest_error(backend, device, dtype, width) for width in widths]
    except ConfigError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - kernels may raise anything
        logger.debug("the trial of varlen failed", exc_info=True)
        return f"varlen fails on {device}: {type(error).__name__}"
    if max(errors) > TOLERANCE:
        return f"varlen is off by {max(errors):.2g} on {device}"
    return None


@torch.inference_mode()
def largest_error(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    script: Script = _SCRIPT,
) -> float:
    """Difference of a backend from the reference, with and without a window, on random numbers.

    The largest difference of what one head gives for one token, relative to its length; infinite if
    anything is not a number. Sessions keep their pages and their order as in an engine.
    """
    page_size = backend.page_multiple
    lengths = [start + count for tick in script for _, start, count in tick]
    num_pages = sum(-(-length // page_size) for length in lengths)
    scheduler = Scheduler(SchedulerConfig(num_pages, page_size, max_batch_tokens=sum(lengths)))
    sessions = {session: bytes([session]) for tick in script for session, _, _ in tick}
    for session_id in sessions.values():
        scheduler.open(session_id, num_rows=1)
    cache = PagedKvCache(1, num_pages, page_size)
    generator = torch.Generator().manual_seed(_SEED)
    reference, largest, ids = SdpaBackend(), 0.0, itertools.count()
    for tick in script:
        for session, start, count in tick:
            row = RowSlice(0, start, count)
            scheduler.add(StepRequest(next(ids), sessions[session], (row,)))
        batch = scheduler.schedule()
        scheduler.commit(batch)
        cache.copy_pages(batch.copies)
        cache.clear_pages(batch.cleared_pages)
        geometry = RaggedBatch(batch.chunks, page_size, cache.null_page, 1 << 30, device)
        query, key, value = (
            torch.randn(1, batch.num_tokens, heads, width, generator=generator)
            .to(device, dtype)
            .transpose(1, 2)
            for heads in (_SHARED * _NUM_KV_HEADS, _NUM_KV_HEADS, _NUM_KV_HEADS)
        )
        pages = cache.write(0, geometry.slots_T, key[0].transpose(0, 1), value[0].transpose(0, 1))
        for window in (None, _WINDOW):
            options = AttentionOptions(Visibility(window=window))
            actual, expected = (
                one.attend(query, key, value, pages, geometry, options).float()
                for one in (backend, reference)
            )
            error = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
            largest = max(largest, math.inf if math.isnan(error) else error)
    return largest
