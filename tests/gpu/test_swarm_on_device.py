"""Servers on a device: the tokens of local generation, quantised weights, and memory given back."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from planetserve import AutoDistributedModelForCausalLM
from planetserve.clock import SystemClock
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.engine.span_runner import SpanRunner
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm
from planetserve.types import BlockSpan

NEW_TOKENS = 12


@pytest.fixture
def prompts() -> torch.Tensor:
    """Three prompts of nine tokens."""
    return torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def clean(device: torch.device) -> Iterator[None]:
    """What the test allocates on a CUDA device must be gone after it."""
    if device.type != "cuda":
        yield
        return
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    yield
    gc.collect()
    # The workspaces of cuBLAS stay, and are no test's.
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated(device) <= before


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_tokens_are_those_of_local_generation(
    family: str, prompts: torch.Tensor, device: torch.device, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path, family)
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    expected = local.generate(prompts.to(device), **options).cpu()
    with (
        LocalSwarm(str(folder), ["0:2", "2:4"], {"device": str(device)}) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=swarm.initial_peers, torch_dtype=torch.float32
        ) as model,
    ):
        assert {server.engine.runner.device.type for server in swarm.servers} == {device.type}
        assert torch.equal(model.generate(prompts, **options), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
def test_a_quantised_span_decodes_as_it_prefills(
    quant_type: str, prompts: torch.Tensor, device: torch.device, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    folder = make_tiny_checkpoint(tmp_path, "llama")
    options = {"device": str(device), "quant_type": quant_type}
    with (
        LocalSwarm(str(folder), ["0:4"], options) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=swarm.initial_peers, torch_dtype=torch.float32
        ) as model,
    ):
        whole = model.generate(prompts[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
        logits = model(whole[:, :-1]).logits
        first = prompts.shape[1]
        assert torch.equal(logits[:, first - 1 :].argmax(-1), whole[:, first:])


@pytest.mark.usefixtures("clean")
def test_memory_is_free_after_close(device: torch.device, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "llama")
    span = BlockSpan(0, 4)
    blocks = SpanBlocks.load(Checkpoint.open(str(folder)), span, torch.float32, device)
    config = EngineConfig(attn_cache_tokens=256)
    runner = SpanRunner(blocks, config.num_pages, config.page_size)
    held = [weakref.ref(parameter) for parameter in blocks.layers.parameters()]
    engine = Engine(runner, config, SystemClock())
    engine.start()
    asyncio.run(engine.measure())
    pages = runner._runner._cache._layers
    assert len(pages) == len(span)
    held += [weakref.ref(layer.keys_PSKD) for layer in pages]
    engine.close()
    del engine, runner, blocks, pages
    gc.collect()
    assert not [reference for reference in held if reference() is not None]
