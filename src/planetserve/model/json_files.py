"""Untrusted JSON files of a checkpoint: bounded in size and depth, one error each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planetserve.errors import ModelError

MAX_DEPTH = 32
"""Maximum depth of nested objects and lists; published configurations have a handful."""
_MOST_BYTES = 64 << 20
"""Maximum size in bytes; the index of 100,000 tensors takes 10 MiB."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ModelError: the file cannot be read, is too large or too deep, or holds something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > _MOST_BYTES:
        raise ModelError(f"{path} is larger than {_MOST_BYTES >> 20} MiB; download it again")
    if not data.strip():
        raise ModelError(f"{path} is empty; download it again")
    if is_lfs_pointer(data):
        raise ModelError(f"{path} {LFS_POINTER}")
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object; download it again")
    return value


def parse_json(data: bytes) -> Any:
    """The value that `data` spells.

    Raises:
        ValueError: it is not JSON, or objects and lists lie more than `MAX_DEPTH` deep.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_depth(value)
    return value


LFS_POINTER = (
    "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download it "
    "with `hf download`"
)


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file that begins like this is a pointer to one that git-lfs has not fetched."""
    return data.startswith(b"version https://git-lfs")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ValueError("it is nested too deep")


def _children(value: Any) -> Iterable[Any]:
    children: Iterable[Any] = ()
    if isinstance(value, dict):
        children = value.values()
    elif isinstance(value, list):
        children = value
    return (child for child in children if isinstance(child, dict | list))
