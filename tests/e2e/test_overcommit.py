"""A server that promises more KV cache than it has: sessions lose pages, and no token changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.testing.swarm import LocalSwarm

CACHE_TOKENS = 256
NUM_TEXTS = 6


def prompt_of(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(5, 90, (1, 20 + 5 * number), generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 50},
        {"max_new_tokens": 20, "num_beams": 3},
        {"max_new_tokens": 50, "prompt_lookup_num_tokens": 4},
    ],
    ids=["greedy", "beams", "speculation"],
)
def test_texts_that_lose_pages_are_those_of_the_local_model(
    llama_folder: Path, local: Any, options: dict[str, Any]
) -> None:
    settings = {"min_new_tokens": options["max_new_tokens"], "do_sample": False, "pad_token_id": 0}
    limits = {
        "attn_cache_tokens": CACHE_TOKENS,
        "inference_max_length": CACHE_TOKENS,
        "page_size": 4,
        "kv_overcommit": 8.0,
        "max_batch_size": 32,
    }
    with (
        LocalSwarm(str(llama_folder), ["0:3", "3:6"], limits) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as model,
        ThreadPoolExecutor(NUM_TEXTS) as pool,
    ):
        texts = pool.map(
            lambda number: model.generate(prompt_of(number), **settings, **options),
            range(NUM_TEXTS),
        )
        got = list(texts)
        stats = [server.engine.stats() for server in swarm.servers]
    for number, ids in enumerate(got):
        assert torch.equal(ids, local.generate(prompt_of(number), **settings, **options))
    for item in stats:
        assert item.preemptions > 0
        assert item.recomputed_tokens > 0
