"""A server's KV memory is bounded, counted in pages, and back to zero after sessions end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.errors import CapacityError, NoChainAvailable
from planetserve.testing.swarm import LocalSwarm


def _wait_until_empty(swarm: LocalSwarm) -> list[int]:
    deadline_s = time.monotonic() + 10
    while True:
        used = [server.engine.stats().pages_used for server in swarm.servers]
        if not any(used) or time.monotonic() > deadline_s:
            return used
        time.sleep(0.02)


def test_pages_return_after_sessions_end(
    model: Any, swarm: LocalSwarm, prompt: torch.Tensor
) -> None:
    with model.inference_session(max_length=40):
        model.generate(prompt, max_new_tokens=5, do_sample=False)
        # 16 of the 16 tokens fed fit one page.
        assert [server.engine.stats().pages_used for server in swarm.servers] == [1, 1, 1]
        assert all(server.engine.stats().pages_leased >= 3 for server in swarm.servers)
    assert _wait_until_empty(swarm) == [0, 0, 0]
    assert [server.engine.stats().pages_leased for server in swarm.servers] == [0, 0, 0]


def test_forgotten_cache_returns_its_pages(
    model: Any, swarm: LocalSwarm, prompt: torch.Tensor
) -> None:
    cache = model(prompt).past_key_values
    assert any(server.engine.stats().pages_used for server in swarm.servers)
    del cache
    assert _wait_until_empty(swarm) == [0, 0, 0]


def test_full_server_refuses_and_small_sessions_still_get_in(
    llama_folder: Path, prompt: torch.Tensor
) -> None:
    options = {"attn_cache_tokens": 128, "inference_max_length": 128}
    with (
        LocalSwarm(str(llama_folder), ["0:6"], options) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers, max_retries=0,
            wait_for_blocks_timeout=1.0,
        ) as model,
    ):  # fmt: skip
        with model.inference_session(max_length=96):
            model.generate(prompt, max_new_tokens=2, do_sample=False)
            with (
                model.inference_session(max_length=64),
                pytest.raises((CapacityError, NoChainAvailable)),
            ):
                model.generate(prompt, max_new_tokens=2, do_sample=False)
            with model.inference_session(max_length=32):
                model.generate(prompt, max_new_tokens=2, do_sample=False)
        assert _wait_until_empty(swarm) == [0]
