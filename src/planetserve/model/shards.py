"""Reading of safetensors files: the header, and single tensors by `read`, never by `mmap`.

A file may be truncated, replaced while it is in use, or hostile. When it is read by offset, each of
these raises an error with the file's name, where a memory mapping would end the process, and only
the requested tensors take memory. Only sizes and dtypes are interpreted here; which tensors a span
needs is decided in `loading`, where files come from in `checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from planetserve.errors import ModelError
from planetserve.model.json_files import LFS_POINTER, is_lfs_pointer, parse_json

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the JSON header."""
_LARGEST = 2**63 - 1
PIECE_BYTES = 4 << 20
"""Bytes that are read and then hashed at a time: they are still in the processor's cache."""

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            if not size:
                raise _damaged(path, "it is empty")
            if is_lfs_pointer(start + file.read(64)):
                raise ModelError(f"{path} {LFS_POINTER}")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, "it is shorter than its own header says")
            file.seek(8)
            header = parse_json(file.read(header_bytes))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(path, "its header is not JSON") from error
    return check_header(path, header, data_start=8 + header_bytes, file_size=size)


def check_header(
    path: Path, header: Any, data_start: int = 0, file_size: int | None = None
) -> dict[str, TensorEntry]:
    """The tensors that a header describes, which must cover the file without gap or overlap.

    Args:
        path: of the file, for messages.
        header: the parsed header.
        data_start: where tensors begin; their offsets count from there.
        file_size: None if the file is not here.

    Raises:
        ModelError: the header is not one of the format, contradicts itself or does not fit.
    """
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    entries = {}
    for name, info in header.items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, info, data_start)
    end = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if file_size is not None and entry.end > file_size:
            raise _damaged(path, f"it ends at byte {file_size}, before tensor {entry.name}")
        if entry.start != end:
            raise _damaged(path, f"tensor {entry.name} does not begin where another ends")
        end = entry.end
    if file_size is not None and end != file_size:
        raise _damaged(path, f"it has {file_size - end} bytes after its last tensor")
    return entries


def _entry(path: Path, name: str, info: Any, data_start: int) -> TensorEntry:
    values = info if isinstance(info, dict) else {}
    dtype_name, shape, offsets = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(dtype_name, str)
        or not _are_sizes(shape)
        or not _are_sizes(offsets)
        or len(offsets) != 2
        or offsets[0] > offsets[1]
    ):
        raise _damaged(path, f"the header entry of {name} is malformed")
    begin, end = offsets
    entry = TensorEntry(name, dtype_name, tuple(shape), data_start + begin, data_start + end)
    dtype = _DTYPES.get(dtype_name)
    if dtype is not None and math.prod(shape) * dtype.itemsize != entry.num_bytes:
        raise _damaged(path, f"the shape of {name} does not match its bytes")
    return entry


def _are_sizes(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list | tuple) and all(
        type(item) is int and 0 <= item <= _LARGEST for item in value
    )


def read_tensor(
    path: Path, entry: TensorEntry, look: Callable[[memoryview], None] | None = None
) -> torch.Tensor:
    """Read one tensor into fresh CPU memory.

    Args:
        path: of its file.
        entry: of the file's header.
        look: is shown the bytes, piece by piece, right after each has been read.

    Raises:
        ModelError: the file cannot be read or ends early.
    """
    dtype = entry.dtype
    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while view:
                count = file.readinto(view if look is None else view[:PIECE_BYTES])
                if not count:
                    raise _damaged(path, f"it ends inside tensor {entry.name}")
                if look is not None:
                    look(view[:count])
                view = view[count:]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return buffer.view(dtype).reshape(entry.shape)


def read_pieces(path: Path, entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces, each valid until the next is asked for.

    Raises:
        ModelError: the file cannot be read or ends early.
    """
    buffer = bytearray(min(PIECE_BYTES, entry.num_bytes))
    left = entry.num_bytes
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while left:
                count = file.readinto(memoryview(buffer)[:left])
                if not count:
                    raise _damaged(path, f"it ends inside tensor {entry.name}")
                yield memoryview(buffer)[:count]
                left -= count
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


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
