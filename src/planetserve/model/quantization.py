"""Spans whose linear layers hold 8 or 4 bits per weight, by transformers' bitsandbytes integration.

`int8` is LLM.int8 (Dettmers et al., 2022) with outliers kept, `nf4` the 4-bit NormalFloat of QLoRA
(Dettmers et al., 2023) computing in the span's dtype. Everything that is no linear layer of a block
keeps the span's dtype. Weights are quantised one tensor at a time while they are read, so memory
never holds the whole span unquantised.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from planetserve.errors import ConfigError, ModelError

BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Of a quantised linear layer; nf4 has a float32 scale for each 64 weights."""

_REQUIRED = ("bitsandbytes", "accelerate")


def require_quantizer(quant_type: str) -> None:
    """Check that weights can be quantised here.

    Raises:
        ConfigError: a library is missing; says how to get it.
    """
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--quant_type {quant_type} needs {' and '.join(missing)}; install them with "
            "`pip install 'planetserve[quant]'`, or leave the flag out"
        )


def prepare_for_quantization(
    model: PreTrainedModel, quant_type: str, dtype: torch.dtype
) -> HfQuantizer:
    """Put quantised layers in the place of a skeleton's linear ones, before weights are loaded.

    Args:
        model: on the meta device.
        quant_type: int8 or nf4.
        dtype: what nf4 layers compute in.

    Raises:
        ConfigError: a library is missing.
        ModelError: the integration refuses the model.
    """
    require_quantizer(quant_type)
    if quant_type == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    try:
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment(device_map={"": "cpu"})
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"its weights cannot be quantised to {quant_type}: {reason}") from error
    return quantizer


def block_bytes(layer: nn.Module, quant_type: str, itemsize: int) -> int:
    """Memory that one block's weights will take.

    Args:
        layer: the block, before its linear layers are replaced; may be on the meta device.
        quant_type: none, int8 or nf4.
        itemsize: bytes per weight of the span's dtype.
    """
    total = 0.0
    for module in layer.modules():
        is_quantised = quant_type != "none" and isinstance(module, nn.Linear | Conv1D)
        for name, parameter in module.named_parameters(recurse=False):
            per_weight = (
                BYTES_PER_WEIGHT[quant_type] if is_quantised and name == "weight" else itemsize
            )
            total += parameter.numel() * per_weight
    return int(total)
