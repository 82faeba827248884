"""Safetensors files are read exactly, and damaged ones give errors instead of crashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from planetserve.errors import ModelError
from planetserve.model.shards import read_header, read_samples, read_tensor

TENSORS = {
    "f32": torch.randn(3, 5),
    "bf16": torch.randn(4, 2).bfloat16(),
    "f16": torch.randn(7).half(),
    "i64": torch.arange(6).reshape(2, 3),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def write_header(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_come_back_as_safetensors_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_header(path)
    assert set(header) == set(TENSORS)
    for name, expected in TENSORS.items():
        got = read_tensor(path, header[name])
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_samples_are_the_first_middle_and_last_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100, dtype=torch.uint8), "b": torch.ones(2)}, path)
    header = read_header(path)
    first, middle, last, *short = read_samples(path, [header["a"], header["b"]], 4)
    assert (first, middle, last) == (bytes(range(4)), bytes(range(48, 52)), bytes(range(96, 100)))
    assert len(short) == 3


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(100)}, path)
    entry = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match="ends inside tensor a"):
        read_tensor(path, entry)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        [],
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": ["2"], "data_offsets": ["0", "8"]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"},
        {"a": 3},
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"__metadata__": ' + b'{"a":' * 60 + b"1" + b"}" * 60 + b"}",
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}',
        b"\xff\xfe",
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: Any) -> None:
    path = write_header(tmp_path / "x.safetensors", header, b"\0" * 8)
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


def test_a_header_longer_than_the_file_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


def test_shape_and_bytes_must_agree(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}
    path = write_header(tmp_path / "x.safetensors", header, b"\0" * 4)
    with pytest.raises(ModelError, match="shape of a"):
        read_tensor(path, read_header(path)["a"])


def test_an_unknown_number_format_is_named(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    path = write_header(tmp_path / "x.safetensors", header, b"\0")
    with pytest.raises(ModelError, match="F4"):
        read_tensor(path, read_header(path)["a"])
