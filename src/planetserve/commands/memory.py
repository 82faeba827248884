"""How much memory is free here, and what a model's blocks take of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from planetserve.config import ServerConfig
from planetserve.errors import ModelError
from planetserve.model.capabilities import check_servable, has_recurrent_layers
from planetserve.model.checkpoint import DTYPES, Checkpoint
from planetserve.model.loading import build_on_meta
from planetserve.model.quantization import BYTES_PER_WEIGHT, block_bytes
from planetserve.model.span_blocks import SpanBlocks, find_decoder
from planetserve.model.span_cache import layer_kinds
from planetserve.model.text_config import shares_kv_heads, text_config
from planetserve.types import BlockSpan

CGROUP = Path("/sys/fs/cgroup")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Memory for a server's blocks.

    Attributes:
        num_bytes: free now, with what this process takes and will give back.
        source: where the number was read.
    """

    num_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """What one kind of weights takes.

    Attributes:
        dtype: of weights and activations.
        quant_type: none, int8 or nf4.
        weights: bytes of each block's weights.
        cache: bytes of each block's KV cache, as large as a server makes it by default.
    """

    dtype: str
    quant_type: str
    weights: tuple[int, ...]
    cache: tuple[int, ...]

    @property
    def per_block(self) -> list[int]:
        return [one + other for one, other in zip(self.weights, self.cache, strict=True)]

    def num_fitting(self, free_bytes: int) -> int:
        """The most consecutive blocks that fit, wherever they begin."""
        sizes, best, start, used = self.per_block, 0, 0, 0
        for end, size in enumerate(sizes):
            used += size
            while used > free_bytes:
                used -= sizes[start]
                start += 1
            best = max(best, end + 1 - start)
        return best


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """What a model takes, by kinds of weights.

    Attributes:
        kinds: every dtype, plain and quantised.
        cache_tokens: tokens of KV cache that each server has by default.
        state_bytes: of what recurrent layers keep per text besides, in all blocks, as bfloat16.
    """

    kinds: tuple[BlockMemory, ...]
    cache_tokens: int
    state_bytes: int

    def kind(self, dtype: str, quant_type: str = "none") -> BlockMemory:
        """One of them."""
        return next(one for one in self.kinds if (one.dtype, one.quant_type) == (dtype, quant_type))


def free_memory(device: torch.device, cgroup: Path = CGROUP) -> FreeMemory:
    """What a server on this device could take now.

    On a CPU that is what the system would give without swapping, or what is left to this container
    if that is less; with what this process takes, since it will have ended then. On a GPU it is
    what its driver says is free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return FreeMemory(free, f"free on {torch.cuda.get_device_name(device)}")
    own = psutil.Process().memory_info().rss
    found = FreeMemory(psutil.virtual_memory().available + own, "available memory")
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        left = limit - used + own + _reclaimable(cgroup)
        if left < found.num_bytes:
            found = FreeMemory(max(0, left), "what this container may still take")
    return found


def model_memory(checkpoint: Checkpoint) -> ModelMemory:
    """What the model takes, from its configuration alone.

    Raises:
        ModelError: it cannot be served.
    """
    check_servable(checkpoint)
    text = text_config(checkpoint.config)
    config = ServerConfig(model=checkpoint.name, num_blocks=1, new_swarm=True)
    cache_tokens = config.cache_tokens(
        shares_kv_heads=shares_kv_heads(checkpoint.config), has_states=has_recurrent_layers(text)
    )
    numbers, state_bytes = _cached_numbers(checkpoint)
    kinds = []
    for name, dtype in DTYPES.items():
        layers = find_decoder(build_on_meta(checkpoint, dtype)).layers
        cache = tuple(cache_tokens * number * dtype.itemsize for number in numbers)
        for quant_type in ("none", *BYTES_PER_WEIGHT):
            weights = (block_bytes(layer, quant_type, dtype.itemsize) for layer in layers)
            kinds.append(BlockMemory(name, quant_type, tuple(weights), cache))
    return ModelMemory(tuple(kinds), cache_tokens, state_bytes)


def _cached_numbers(checkpoint: Checkpoint) -> tuple[list[int], int]:
    """For each block, how many numbers it caches per token; and the bytes of states per text.

    Blocks run on the meta device where their code allows it, and else with made-up weights, one of
    each kind.
    """
    span = BlockSpan(0, checkpoint.num_blocks)
    dtype = torch.bfloat16  # the one in which torch's meta kernels for experts run
    try:
        return _shapes(SpanBlocks.load(checkpoint, span, dtype, "meta", at_random=True))
    except (RuntimeError, NotImplementedError, ModelError):
        skeleton = find_decoder(build_on_meta(checkpoint, dtype)).layers
        found: dict[object, tuple[list[int], int]] = {}
        every = []
        for block, kind in enumerate(layer_kinds(text_config(checkpoint.config))):
            sizes = [tuple(one.shape) for one in skeleton[block].parameters()]
            key = (kind, tuple(sizes))
            if key not in found:
                one = BlockSpan(block, block + 1)
                found[key] = _shapes(SpanBlocks.load(checkpoint, one, dtype, at_random=True))
            every.append(found[key])
        return [number for own, _ in every for number in own], sum(states for _, states in every)


def _shapes(blocks: SpanBlocks) -> tuple[list[int], int]:
    shapes = iter(blocks.kv_shapes())
    numbers = []
    for kind in blocks.kinds:
        shape = next(shapes) if kind.has_keys else None
        numbers.append(shape.num_heads * (shape.key_dim + shape.value_dim) if shape else 0)
    return numbers, blocks.state_bytes()


def _number(path: Path) -> int | None:
    """What a file of the system says; None if it sets no limit, or is not there."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return None


def _reclaimable(cgroup: Path) -> int:
    """Bytes of cached files that count for the container and that the system gives up first."""
    with contextlib.suppress(OSError, ValueError):
        for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                return int(value)
    return 0


def mib(num_bytes: float) -> str:
    """A size for people."""
    if num_bytes >= 10 * 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / MIB:.1f} MiB"


def spread(values: Sequence[int]) -> str:
    """A size, or the least and the most where blocks differ."""
    least, most = min(values), max(values)
    return mib(most) if mib(least) == mib(most) else f"{mib(least)} to {mib(most)}"
