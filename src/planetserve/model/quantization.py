"""Spans whose linear layers hold 8 or 4 bits per weight, by transformers' bitsandbytes integration.

`int8` is LLM.int8 (Dettmers et al., 2022) with outliers kept, `nf4` the 4-bit NormalFloat of QLoRA
(Dettmers et al., 2023) computing in the span's dtype. Everything in a block that is neither a
linear layer nor an expert keeps the span's dtype. Weights are quantised one tensor at a time while
they are read, experts block by block, so memory never holds the whole span unquantised.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from planetserve.errors import ConfigError, ModelError, one_line
from planetserve.model import experts

BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes per weight of a quantised linear layer; nf4 has a float32 scale per 64 weights."""

STORED = "stored"
"""The quantisation type of spans that keep the numbers of a checkpoint that is stored quantised."""

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
        reason = one_line(error, 300)
        raise ModelError(f"its weights cannot be quantised to {quant_type}: {reason}") from error
    return quantizer


def quantize_experts(block: nn.Module, quantizer: HfQuantizer) -> None:
    """Quantise a loaded block's experts, whose weights the integration leaves as they are.

    Args:
        block: one of a model that was prepared by `prepare_for_quantization`.
        quantizer: what that returned.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    def quantized(layer: nn.Module, _: str) -> nn.Module:
        device, weight = layer.weight.device, layer.weight.data.cpu().contiguous()
        holder = nn.ModuleList([layer])
        replace_with_bnb_linear(holder, quantization_config=quantizer.quantization_config)
        made: nn.Module = holder[0]
        # Like the integration: from the CPU, because moving is what quantises 8 bits.
        whole = type(made.weight)(weight, requires_grad=False, **vars(made.weight))
        made.weight = whole.to(device)
        made.bias = layer.bias
        return made

    for module in list(block.modules()):
        if experts.has_experts(module):
            experts.split(module, quantized)
            for part in module.modules():
                # transformers' own mark, without which it would fill them with random numbers.
                part._is_hf_initialized = True  # noqa: SLF001


def block_bytes(layer: nn.Module, quant_type: str, itemsize: int) -> int:
    """Memory that one block's weights will take.

    Args:
        layer: the block, before its linear layers are replaced; may be on the meta device.
        quant_type: what the weights become; anything but int8 and nf4 counts as the span's dtype.
        itemsize: bytes per weight of the span's dtype.
    """
    total = 0.0
    for module in layer.modules():
        num_matrices = experts.num_weights(module)
        if isinstance(module, nn.Linear | Conv1D):
            num_matrices = module.weight.numel()
        num_all = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        per_weight = BYTES_PER_WEIGHT.get(quant_type, itemsize)
        total += num_matrices * per_weight + (num_all - num_matrices) * itemsize
    return int(total)
