"""Everything that `planetserve check` finds out about a checkpoint, as values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from planetserve.check.comparison import Comparison, Progress, compare
from planetserve.check.slices import (
    BlockKind,
    block_kinds,
    float32_bytes,
    num_blocks_of_each_kind,
    shortened,
)
from planetserve.engine.span_runner import SpanRunner
from planetserve.errors import ModelError
from planetserve.model.capabilities import check_servable, has_recurrent_layers
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.decoder import find_decoder
from planetserve.model.families import TESTED
from planetserve.model.loading import WeightLoader, build_on_meta
from planetserve.model.quantization import block_bytes
from planetserve.model.span_blocks import SpanBlocks
from planetserve.model.text_config import text_config
from planetserve.types import BlockSpan

CONTEXT = 1000
"""Tokens of each session where passes are counted."""
_SMALL_BYTES = 2 << 30
"""Models that take less in float32 are tried whole."""
_FEW_BLOCKS = 4
_PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class KindSizes:
    """What a block of one kind takes.

    Attributes:
        kind: the blocks.
        stored_bytes: in the checkpoint's files.
        memory_bytes: on a server, by dtype or `--quant_type`.
    """

    kind: BlockKind
    stored_bytes: int
    memory_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Batching:
    """How sessions share the passes of a server.

    Attributes:
        way: ragged, padded or plain.
        sessions: with contexts of `CONTEXT` tokens, that share a pass for their next tokens; None
            if only `--max_batch_size` limits them.
        why: why not raggedly, and if not padded either, why not; empty if raggedly.
        kv_bytes_per_token: of the blocks tried, in bfloat16.
        state_bytes: of one session, likewise.
    """

    way: str
    sessions: int | None
    why: str
    kv_bytes_per_token: int
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it.

    Attributes:
        name: of the checkpoint.
        model_type: of its configuration.
        num_blocks: of the whole model.
        quantization: the method in which weights are stored; None if they are plain.
        sizes: of each kind of block.
        comparison: with the model in one piece.
        batching: of the blocks tried; None if the comparison has failed.
        notes: what is missing, each with what to do about it.
    """

    name: str
    model_type: str
    num_blocks: int
    quantization: str | None
    sizes: Sequence[KindSizes]
    comparison: Comparison
    batching: Batching | None
    notes: Sequence[str]

    @property
    def is_equal(self) -> bool:
        """Whether the model gives the same in parts as in one piece."""
        return self.comparison.is_equal


def check(checkpoint: Checkpoint, *, whole: bool = False, progress: Progress) -> Report:
    """Try a checkpoint on this machine, on the CPU and in float32.

    Args:
        checkpoint: what to try.
        whole: whether all blocks of a large model are tried; otherwise the first few.
        progress: called with what is being done.

    Raises:
        ModelError: it is refused, damaged, too large for this machine, or cannot run in steps.
    """
    check_servable(checkpoint)
    progress(f"reading what is stored of {checkpoint.name}")
    sizes, count = _plan(checkpoint, whole=whole)
    part = shortened(checkpoint, count)
    comparison = compare(part, progress)
    batching = None
    if comparison.is_equal:
        progress("trying how sessions share passes")
        batching = try_batching(part)
    return Report(
        name=checkpoint.name,
        model_type=checkpoint.config.model_type,
        num_blocks=checkpoint.num_blocks,
        quantization=(checkpoint.quantization() or {}).get("quant_method"),
        sizes=sizes,
        comparison=comparison,
        batching=batching,
        notes=_notes(checkpoint, [size.kind for size in sizes], count),
    )


def _plan(checkpoint: Checkpoint, *, whole: bool) -> tuple[list[KindSizes], int]:
    """What blocks take, and how many of them to try.

    Raises:
        ModelError: weights are missing, or even one block is too large for this machine.
    """
    skeleton = build_on_meta(checkpoint, torch.bfloat16)
    decoder, head = find_decoder(skeleton), skeleton.get_output_embeddings()
    loader = WeightLoader(skeleton, checkpoint, torch.bfloat16, "cpu")
    base = f"{decoder.base_path}." if decoder.base_path else ""
    head_names = {name for name, module in skeleton.named_modules() if module is head}
    loader.check(lambda name: name.startswith(base) or name.rpartition(".")[0] in head_names)

    def stored_bytes(block: int) -> int:
        return loader.stored_bytes(lambda name: decoder.layer_of(name) == block)

    kinds = block_kinds(decoder)
    sizes = [
        KindSizes(kind, stored_bytes(kind.blocks[0]), _memory(decoder.layers[kind.blocks[0]]))
        for kind in kinds
    ]
    count = num_blocks_of_each_kind(kinds, _FEW_BLOCKS)
    if whole or float32_bytes(decoder, checkpoint.num_blocks, head) <= _SMALL_BYTES:
        count = checkpoint.num_blocks
    free = _available_bytes()
    while count and 2 * float32_bytes(decoder, count, head) > free:
        count -= 1
    if not count:
        needed = 2 * float32_bytes(decoder, 1, head) / 2**30
        raise ModelError(
            f"{checkpoint.name}: one block, embedding and head take {needed:.1f} GiB twice in "
            f"float32, and {free / 2**30:.1f} GiB are free; check it on a larger machine"
        )
    return sizes, count


def try_batching(checkpoint: Checkpoint) -> Batching:
    """How sessions share the passes of a server that holds all blocks of a checkpoint.

    Raises:
        ModelError: the model cannot run in steps.
    """
    blocks = SpanBlocks.load(checkpoint, BlockSpan(0, checkpoint.num_blocks), torch.float32)
    # Enough for the states of a few sessions; memory is only taken when it is written.
    state_tokens = 4 * blocks.state_bytes() // (checkpoint.hidden_size * torch.float32.itemsize)
    num_pages = 64 + state_tokens // _PAGE_SIZE
    runner = SpanRunner(blocks, num_pages, _PAGE_SIZE)
    verdict = runner.verdict
    half = torch.bfloat16.itemsize / torch.float32.itemsize
    return Batching(
        way=str(verdict.batching),
        sessions=runner.sessions_per_pass(CONTEXT),
        why="; ".join(filter(None, [verdict.why_not_ragged, verdict.why_not_padded])),
        kv_bytes_per_token=int(runner.bytes_per_token * half),
        state_bytes=int(blocks.state_bytes() * half),
    )


def _memory(layer: torch.nn.Module) -> dict[str, int]:
    sizes = {
        str(dtype).removeprefix("torch."): block_bytes(layer, "none", dtype.itemsize)
        for dtype in (torch.float32, torch.bfloat16)
    }
    for quant_type in ("int8", "nf4"):
        sizes[quant_type] = block_bytes(layer, quant_type, torch.bfloat16.itemsize)
    return sizes


def _notes(checkpoint: Checkpoint, kinds: Sequence[BlockKind], num_tried: int) -> list[str]:
    notes = []
    config = checkpoint.config
    if config.model_type not in TESTED:
        notes.append(
            f"model type {config.model_type} is not among the tested ones, so both ends warn; add "
            "a tiny form of it to the tests (docs/add_a_family.md)"
        )
    notes += [
        f"not tried: {kind.name} (first: block {kind.blocks[0]}); its first blocks take too much "
        "memory for this machine: check it on a larger one"
        for kind in kinds
        if kind.blocks[0] >= num_tried
    ]
    if text_config(config) is not config:
        notes.append("only its language model is served: images, video and sound are refused")
    if checkpoint.quantization():
        notes.append(
            "its weights keep the bits they are stored with on a CPU (--quant_type stored), where "
            "there are kernels for them, and are dequantised elsewhere; sizes are those of "
            "dequantised weights"
        )
    if has_recurrent_layers(text_config(config)):
        notes.append(
            "its layers keep states, which only servers do: clients cannot run blocks themselves "
            "(local_blocks)"
        )
    return notes


def _available_bytes() -> int:
    """Memory that is free on this machine."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (line,) = [line for line in lines if line.startswith("MemAvailable:")]
        return int(line.split()[1]) << 10
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
