"""The storage formats that are read, by the `quant_method` of a checkpoint's configuration."""

from __future__ import annotations

from collections.abc import Mapping

from planetserve.errors import ModelError
from planetserve.model.stored_formats.base import Headers, Layout, Method, Rule, Settings
from planetserve.model.stored_formats.bitsandbytes import BITSANDBYTES
from planetserve.model.stored_formats.fp4 import fp4_layout
from planetserve.model.stored_formats.gptq_awq import AWQ, GPTQ
from planetserve.model.stored_formats.mxfp4 import MXFP4
from planetserve.model.stored_formats.packed_int import packed_layout
from planetserve.model.stored_formats.scaled import (
    FBGEMM_FP8,
    FINE_GRAINED_FP8,
    WEIGHT_SCALE,
    scaled_layout,
)


def _compressed_layout(headers: Headers, settings: Settings) -> Layout:
    is_fp4 = headers["weight"].dtype.itemsize == 1
    return (fp4_layout if is_fp4 else packed_layout)(headers, settings)


def _check_compressed(settings: Settings) -> None:
    if settings.get("quantization_status", "compressed") != "compressed":
        raise ModelError(f"quantization_status is {settings['quantization_status']!r}")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ModelError("sparse compressed-tensors are not read")
    if settings.get("transform_config"):
        raise ModelError("compressed-tensors with transforms are not read")


def _check_modelopt(settings: Settings) -> None:
    algorithm = str(settings.get("quant_algo") or "MIXED_PRECISION").upper()
    if not algorithm.startswith(("FP8", "NVFP4", "MXFP8", "MIXED_PRECISION", "W4A16_NVFP4")):
        raise ModelError(f"ModelOpt's {algorithm[:40]!r} is not read")


def _modelopt_layout(headers: Headers, settings: Settings) -> Layout:
    if "smoothing" in headers:
        raise ModelError(f"{headers['smoothing'].name}: ModelOpt's AWQ is not read")
    is_fp4 = headers["weight"].dtype.itemsize == 1 and "multiplier" in headers
    return (fp4_layout if is_fp4 else scaled_layout)(headers, settings)


METHODS: Mapping[str, Method] = {
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
    "compressed-tensors": Method(
        (
            Rule(
                marker=".weight_packed",
                weight=".weight",
                required={"weight": ".weight_packed", "scale": ".weight_scale"},
                optional={
                    "zero_point": ".weight_zero_point",
                    "group_of": ".weight_g_idx",
                    "shape": ".weight_shape",
                    "divisor": ".weight_global_scale",
                },
                layout=_compressed_layout,
            ),
            WEIGHT_SCALE,
        ),
        _check_compressed,
    ),
    "fbgemm_fp8": FBGEMM_FP8,
    "fp8": FINE_GRAINED_FP8,
    "gptq": GPTQ,
    "modelopt": Method(
        (
            Rule(
                marker=".weight_scale",
                weight=".weight",
                required={"weight": ".weight", "scale": ".weight_scale"},
                optional={"multiplier": ".weight_scale_2", "smoothing": ".pre_quant_scale"},
                layout=_modelopt_layout,
            ),
        ),
        _check_modelopt,
    ),
    "mxfp4": MXFP4,
}
