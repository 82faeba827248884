"""Tiny checkpoints stored quantised, each with a plain one of the same, rounded weights beside it.

Written from the descriptions of the formats, not with the code that reads them. The plain one says
what a whole local model gives for the quantised one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from planetserve.testing.checkpoints import FAMILIES, make_tiny_checkpoint
from planetserve.testing.multimodal import is_multimodal

Encoded = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Ending of a name -> stored tensor; the weight that they stand for, float32."""
Encode = Callable[[torch.Tensor], Encoded]

_LINEAR = re.compile(r"(layers|blocks)\.\d+\..*(_proj|\.w[123]|q_a|kv_b|fc[12])\.weight$")
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_GROUP = 8


def make_stored_checkpoint(
    folder: Path, method: str, family: str = "llama", **overrides: Any
) -> tuple[Path, Path]:
    """Write a checkpoint stored by `method` (of `METHODS` or `WIDE_METHODS`) and its plain twin.

    Returns:
        Their folders.
    """
    # Rows of 64 numbers hold whole blocks of each format.
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
    own = FAMILIES[family].overrides
    if "q_lora_rank" in {**own, **own.get("text_config", {})}:
        sizes["q_lora_rank"] = 16
    if is_multimodal(FAMILIES[family].model_type):
        sizes = {"text_config": {**own.get("text_config", {}), **sizes}}
    plain = make_tiny_checkpoint(folder / "plain", family, **{**sizes, **overrides})
    return store_quantised(plain, folder / "quantised", method), plain


def store_quantised(plain: Path, quantised: Path, method: str) -> Path:
    """Write a checkpoint stored by `method`, and its rounded weights into the plain one's folder.

    Args:
        plain: a folder with one file of weights.
        quantised: a folder to make.
        method: of `METHODS` or `WIDE_METHODS`.

    Returns:
        `quantised`.
    """
    settings, encode, filename = {**METHODS, **WIDE_METHODS}[method]
    stored, rounded = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if method == "mxfp4":
            is_wanted = bool(re.search(r"experts\.(gate_up|down)_proj$", name))
        else:
            is_wanted = bool(_LINEAR.search(name))
        if not is_wanted:
            stored[name] = rounded[name] = weight
            continue
        tensors, rounded[name] = encode(weight.float())
        stem = name if method == "mxfp4" else name.removesuffix(".weight")
        stored |= {stem + ending: tensor.contiguous() for ending, tensor in tensors.items()}
    quantised.mkdir()
    save_file(rounded, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    if filename == "config.json":
        config["quantization_config"] = settings
    else:
        (quantised / filename).write_text(json.dumps({"quantization": settings}))
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised


def _blocks(weight_NK: torch.Tensor, size_N: int, size_K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest absolute value of each block, and the same at every number of the block."""
    height, width = weight_NK.shape
    grid = torch.stack([
        torch.stack([
            weight_NK[i : i + size_N, j : j + size_K].abs().max()
            for j in range(0, width, size_K)
        ])
        for i in range(0, height, size_N)
    ])  # fmt: skip
    wide = grid.repeat_interleave(size_N, 0)[:height].repeat_interleave(size_K, 1)[:, :width]
    return grid, wide


def _fp8(size_N: int | None, size_K: int | None, ending: str, scale_dtype: torch.dtype) -> Encode:
    def encode(weight: torch.Tensor) -> Encoded:
        grid, _ = _blocks(weight, size_N or len(weight), size_K or weight.shape[1])
        scales = grid / 448
        if scale_dtype == torch.float8_e8m0fnu:
            scales = scales.log2().ceil().exp2()
        scales = scales.to(scale_dtype)
        wide = scales.float().repeat_interleave(size_N or len(weight), 0)[: len(weight)]
        wide = wide.repeat_interleave(size_K or weight.shape[1], 1)[:, : weight.shape[1]]
        numbers = (weight / wide).to(torch.float8_e4m3fn)
        if size_N is None and size_K is None:
            scales = scales.reshape(())
        return {".weight": numbers, ending: scales}, numbers.float() * wide

    return encode


def _nearest_fp4(scaled: torch.Tensor) -> torch.Tensor:
    index = (scaled.abs().unsqueeze(-1) - _FP4).abs().argmin(-1)
    return (index + 8 * (scaled < 0)).to(torch.uint8)


def _value_fp4(code: torch.Tensor) -> torch.Tensor:
    return _FP4[(code & 7).long()] * (1 - 2 * (code >> 3).float())


def _mxfp4(weight_EKN: torch.Tensor) -> Encoded:
    weight = weight_EKN.transpose(1, 2).contiguous()
    groups = weight.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1).clamp(min=1e-6) / 6).log2().ceil()
    codes = _nearest_fp4(groups / exponents.exp2().unsqueeze(-1))
    rounded = (_value_fp4(codes) * exponents.exp2().unsqueeze(-1)).flatten(-2).transpose(1, 2)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    tensors = {"_blocks": packed, "_scales": (exponents + 127).to(torch.uint8)}
    return tensors, rounded.contiguous()


def _nvfp4(ending: str, of_all: str, *, divides: bool) -> Encode:
    def encode(weight: torch.Tensor) -> Encoded:
        groups = weight.unflatten(-1, (-1, 16))
        factor = weight.abs().max() / (6 * 448)
        scales = (groups.abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)
        wide = (scales.float() * factor).unsqueeze(-1)
        codes = _nearest_fp4(groups / wide)
        rounded = (_value_fp4(codes) * wide).flatten(-2)
        flat = codes.flatten(-2)
        tensors = {ending: flat[:, 0::2] | flat[:, 1::2] << 4, ".weight_scale": scales}
        tensors[of_all] = (1 / factor).reshape(1) if divides else factor
        return tensors | {".input_scale": torch.ones(())}, rounded

    return encode


def _pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Neighbours in a row into one int32, the first in the lowest bits."""
    parts = numbers.long().unflatten(-1, (-1, 32 // bits))
    words = (parts << torch.arange(0, 32, bits)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _int_groups(weight: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, ...]:
    """Unsigned numbers `[N, K]`, zero points and scales `[N, G]` of asymmetric groups."""
    groups = weight.unflatten(-1, (-1, size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    numbers = (groups / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round()
    return numbers.clamp(0, 2**bits - 1).flatten(-2), zeros, scales


def _rounded(numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, size: int) -> Any:
    wide = zeros.repeat_interleave(size, 1), scales.repeat_interleave(size, 1)
    return (numbers - wide[0]) * wide[1]


def _packed_int4(*, is_symmetric: bool, group: int = _GROUP) -> Encode:
    def encode(weight: torch.Tensor) -> Encoded:
        numbers, zeros, scales = _int_groups(weight, 4, group)
        if is_symmetric:
            groups = weight.unflatten(-1, (-1, group))
            scales = (groups.abs().amax(-1) / 7).half().float()
            zeros = torch.full_like(scales, 8)
            numbers = (groups / scales.unsqueeze(-1)).round().clamp(-8, 7).flatten(-2) + 8
        tensors = {
            ".weight_packed": _pack(numbers, 4),
            ".weight_scale": scales.half(),
            ".weight_shape": torch.tensor(weight.shape),
        }
        if not is_symmetric:
            tensors[".weight_zero_point"] = _pack(zeros.t(), 4).t()
        return tensors, _rounded(numbers, zeros, scales, group)

    return encode


def _int8_rows(weight: torch.Tensor) -> Encoded:
    scales = weight.abs().amax(-1, keepdim=True) / 127
    numbers = (weight / scales).round()
    return {".weight": numbers.to(torch.int8), ".weight_scale": scales}, numbers * scales


def _gptq(bits: int, *, is_ordered: bool) -> Encode:
    def encode(weight: torch.Tensor) -> Encoded:
        width = weight.shape[1]
        order = torch.arange(width)
        if not is_ordered:
            order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
        numbers, zeros, scales = _int_groups(weight[:, order], bits, _GROUP)
        rounded = torch.empty_like(weight)
        rounded[:, order] = _rounded(numbers, zeros, scales, _GROUP)
        placed = torch.empty_like(numbers)
        placed[:, order] = numbers
        group_of = torch.empty(width, dtype=torch.int32)
        group_of[order] = (torch.arange(width) // _GROUP).int()
        tensors = {
            ".qweight": _pack(placed, bits).t(),
            ".qzeros": _pack(zeros.t() - 1, bits),
            ".scales": scales.t().half(),
            ".g_idx": group_of,
        }
        return tensors, rounded

    return encode


def _awq(weight: torch.Tensor) -> Encoded:
    numbers, zeros, scales = _int_groups(weight, 4, _GROUP)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(rows: torch.Tensor) -> torch.Tensor:
        return _pack(rows.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    tensors = {
        ".qweight": pack(numbers.t()),
        ".qzeros": pack(zeros.t()),
        ".scales": scales.t().half(),
    }
    return tensors, _rounded(numbers, zeros, scales, _GROUP)


def _bnb_int8(weight: torch.Tensor) -> Encoded:
    largest = weight.abs().amax(-1)
    numbers = (weight * 127 / largest[:, None]).round().to(torch.int8)
    tensors = {".weight": numbers, ".SCB": largest, ".weight_format": torch.tensor(0).byte()}
    return tensors, numbers.float() * largest[:, None] / 127


def _bnb_4bit(kind: str, *, is_nested: bool) -> Encode:
    def encode(weight: torch.Tensor) -> Encoded:
        from bitsandbytes import functional

        # Rows as long as a block: bitsandbytes' own decoder goes wrong with shorter ones.
        packed, state = functional.quantize_4bit(
            weight.reshape(-1, 64), blocksize=64, quant_type=kind, compress_statistics=is_nested
        )
        rounded = functional.dequantize_4bit(packed, state).view(weight.shape)
        state.shape = weight.shape
        tensors = {f".weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        return {".weight": packed, **tensors}, rounded

    return encode


_INT4 = {"weights": {"num_bits": 4, "type": "int", "group_size": _GROUP}}
_COMPRESSED: Mapping[str, Any] = {"quant_method": "compressed-tensors"}
_GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "group_size": _GROUP}
_PLAIN_CONFIG = "config.json"
_F8 = {"weights": {"num_bits": 8, "type": "float"}}

METHODS: Mapping[str, tuple[Mapping[str, Any], Encode, str]] = {
    "fp8_blocks": (
        {"quant_method": "fp8", "weight_block_size": [24, 20], "activation_scheme": "dynamic"},
        _fp8(24, 20, ".weight_scale_inv", torch.float32),
        _PLAIN_CONFIG,
    ),
    "fp8_ue8m0": (
        {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
        _fp8(16, 16, ".weight_scale_inv", torch.float8_e8m0fnu),
        _PLAIN_CONFIG,
    ),
    "fp8_static": (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        _fp8(None, None, ".weight_scale_inv", torch.bfloat16),
        _PLAIN_CONFIG,
    ),
    "fbgemm_fp8": (
        {"quant_method": "fbgemm_fp8"}, _fp8(1, None, ".weight_scale", torch.float32),
        _PLAIN_CONFIG,
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, _mxfp4, _PLAIN_CONFIG),
    "compressed_int4": (
        {**_COMPRESSED, "format": "pack-quantized", "config_groups": {"group_0": _INT4}},
        _packed_int4(is_symmetric=True),
        _PLAIN_CONFIG,
    ),
    "compressed_int4_zero_points": (
        {**_COMPRESSED, "format": "pack-quantized", "config_groups": {"group_0": _INT4}},
        _packed_int4(is_symmetric=False),
        _PLAIN_CONFIG,
    ),
    "compressed_w8a8": ({**_COMPRESSED, "format": "int-quantized"}, _int8_rows, _PLAIN_CONFIG),
    "compressed_fp8": (
        {**_COMPRESSED, "format": "float-quantized", "config_groups": {"group_0": _F8}},
        _fp8(1, None, ".weight_scale", torch.bfloat16),
        _PLAIN_CONFIG,
    ),
    "compressed_nvfp4": (
        {**_COMPRESSED, "format": "nvfp4-pack-quantized"},
        _nvfp4(".weight_packed", ".weight_global_scale", divides=True),
        _PLAIN_CONFIG,
    ),
    "gptq": ({**_GPTQ, "bits": 4, "desc_act": False}, _gptq(4, is_ordered=True), _PLAIN_CONFIG),
    "gptq_act_order": (
        {**_GPTQ, "bits": 4, "desc_act": True}, _gptq(4, is_ordered=False), _PLAIN_CONFIG,
    ),
    "gptq_8": ({**_GPTQ, "bits": 8}, _gptq(8, is_ordered=True), _PLAIN_CONFIG),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "version": "gemm"}, _awq,
        _PLAIN_CONFIG,
    ),
    "modelopt_fp8": (
        {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        _fp8(None, None, ".weight_scale", torch.float32),
        "hf_quant_config.json",
    ),
    "modelopt_nvfp4": (
        {"quant_algo": "NVFP4", "group_size": 16},
        _nvfp4(".weight", ".weight_scale_2", divides=False),
        "hf_quant_config.json",
    ),
    "bnb_int8": ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, _bnb_int8, _PLAIN_CONFIG),
    "bnb_nf4": (
        {"load_in_4bit": True, "quant_method": "bitsandbytes"}, _bnb_4bit("nf4", is_nested=False),
        _PLAIN_CONFIG,
    ),
    "bnb_fp4_nested": (
        {"load_in_4bit": True, "quant_method": "bitsandbytes"}, _bnb_4bit("fp4", is_nested=True),
        _PLAIN_CONFIG,
    ),
}  # fmt: skip
"""Name -> settings, how a weight is stored, and the file that the settings are in."""

WIDE_METHODS: Mapping[str, tuple[Mapping[str, Any], Encode, str]] = {
    "int4_of_128": (
        METHODS["compressed_int4"][0], _packed_int4(is_symmetric=True, group=128), _PLAIN_CONFIG,
    ),
    "fp8_of_128": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        _fp8(128, 128, ".weight_scale_inv", torch.float32),
        _PLAIN_CONFIG,
    ),
}  # fmt: skip
"""Formats in the block sizes of published checkpoints, for models as wide as these."""
