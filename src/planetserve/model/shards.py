"""Reading of safetensors files: the header, and single tensors by `read`, never by `mmap`.

A contributor's file may be truncated, replaced while it is in use, or hostile. Reading by offset
turns each of these into an error with the file's name, where a mapping would kill the process, and
it keeps resident memory at the bytes of the tensors asked for. Only sizes and dtypes are
interpreted here; which tensors a span needs is decided in `loading`, where files come from in
`checkpoint`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planetserve.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the JSON header."""

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as its file's header describes it; `start` and `end` are absolute file offsets."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            ModelError: the file uses a number format that is not read here.
        """
        if self.dtype_name not in _DTYPES:
            raise ModelError(
                f"tensor {self.name} is stored as {self.dtype_name}, which is not supported; "
                "use a float32, bfloat16 or float16 checkpoint"
            )
        return _DTYPES[self.dtype_name]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file.

    Raises:
        ModelError: the file is missing, truncated, or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, "it is shorter than its own header says")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise _damaged(path, "its header is not JSON") from error
    return _entries(path, header, data_start=8 + header_bytes, file_size=size)


def _entries(path: Path, header: Any, data_start: int, file_size: int) -> dict[str, TensorEntry]:
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = info["data_offsets"]
            entry = TensorEntry(
                name=name,
                dtype_name=str(info["dtype"]),
                shape=tuple(int(length) for length in info["shape"]),
                start=data_start + int(begin),
                end=data_start + int(end),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"the header entry of {name} is malformed") from error
        if not data_start <= entry.start <= entry.end or min(entry.shape, default=0) < 0:
            raise _damaged(path, f"the header entry of {name} is malformed")
        if entry.end > file_size:
            raise _damaged(path, f"it ends at byte {file_size}, before tensor {name}")
        entries[name] = entry
    return entries


def read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """Read one tensor into fresh CPU memory.

    Raises:
        ModelError: the file cannot be read, ends early, or shape and bytes disagree.
    """
    dtype = entry.dtype
    if math.prod(entry.shape) * dtype.itemsize != entry.num_bytes:
        raise _damaged(path, f"the shape of {entry.name} does not match its bytes")
    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view = memoryview(buffer.numpy())
            while view:
                count = file.readinto(view)
                if not count:
                    raise _damaged(path, f"it ends inside tensor {entry.name}")
                view = view[count:]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return buffer.view(dtype).reshape(entry.shape)


def read_samples(path: Path, entries: list[TensorEntry], sample_bytes: int) -> list[bytes]:
    """Read the first, middle and last `sample_bytes` of each tensor, in the order given."""
    samples = []
    try:
        with path.open("rb") as file:
            for entry in entries:
                length = min(sample_bytes, entry.num_bytes)
                middle = (entry.start + entry.end - length) // 2
                for start in (entry.start, middle, entry.end - length):
                    file.seek(start)
                    samples.append(file.read(length))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return samples


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is damaged: {what}; download or copy it again")
