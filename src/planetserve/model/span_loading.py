"""Reads the weights of a span's blocks, in the form that `quant_type` asks for."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from planetserve.model.checkpoint import Checkpoint
from planetserve.model.decoder import Decoder
from planetserve.model.loading import WeightLoader
from planetserve.model.quantization import (
    BYTES_PER_WEIGHT,
    STORED,
    block_bytes,
    prepare_for_quantization,
    quantize_experts,
)
from planetserve.model.stored_linear import StoredWeights
from planetserve.types import BlockSpan

logger = logging.getLogger(__name__)


def load_span(
    model: PreTrainedModel,
    decoder: Decoder,
    checkpoint: Checkpoint,
    span: BlockSpan,
    dtype: torch.dtype,
    device: torch.device | str,
    quant_type: str,
) -> None:
    """Read the weights of a span's layers into a skeleton, block by block, after saying how much
    memory they will take.

    Raises:
        ModelError: weights are missing or damaged, or fit neither the model nor the kernels.
        ConfigError: a library for `quant_type` is missing.
    """
    layers = {block: decoder.layers[block] for block in range(span.start, span.end)}
    block_sizes = {
        block: block_bytes(layer, quant_type, dtype.itemsize) for block, layer in layers.items()
    }
    quantizer = None
    if quant_type in BYTES_PER_WEIGHT:
        quantizer = prepare_for_quantization(model, quant_type, dtype)
    loader = WeightLoader(model, checkpoint, dtype, device, quantizer)
    stored = StoredWeights(model, loader, dtype)
    if quant_type == STORED:
        for block, layer in layers.items():
            block_sizes[block] -= stored.plan(layer)
    total, largest = sum(block_sizes.values()), max(block_sizes.values())
    logger.info(
        "blocks %s take about %.1f MiB each (%.1f MiB together), quant_type %s",
        span, largest / 2**20, total / 2**20, quant_type,
    )  # fmt: skip
    loader.prepare(lambda name: decoder.layer_of(name) in span)
    for block, layer in layers.items():

        def is_wanted(name: str, block: int = block) -> bool:
            return decoder.layer_of(name) == block and not stored.keeps(name)

        loader.load(is_wanted)
        stored.fill(layer)
        if quantizer is not None:
            quantize_experts(layer, quantizer)
