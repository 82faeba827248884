"""Copies between the host and the device that block neither.

A copy from or to ordinary memory makes the engine thread wait for all queued work of a CUDA device;
a copy from pinned memory is only queued. Pinned memory comes from torch's allocator, which keeps it
for the next pass and knows when a copy is finished. On other devices these are the plain copies, or
none.
"""

from __future__ import annotations

from array import array

import torch

_DTYPES = {"i": torch.int32, "q": torch.int64}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def integers(numbers: array[int], device: torch.device) -> torch.Tensor:
    """Numbers (type codes `i` and `q`, at least one) on `device`; on the CPU the same memory."""
    return to_device(torch.frombuffer(numbers, dtype=_DTYPES[numbers.typecode]), device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a device on the host, complete; in ordinary memory, because it may be kept."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned.clone()
