"""Several users at once: every answer is what its user would have got alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from planetserve.testing.swarm import LocalSwarm

GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}


def test_threads_share_one_model(model: Any, local: Any, swarm: LocalSwarm) -> None:
    generator = torch.Generator().manual_seed(11)
    prompts = [
        torch.randint(5, 90, (1, length), generator=generator) for length in (3, 40, 17, 5, 26, 9)
    ]
    expected = [local.generate(ids, **GREEDY) for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda ids: model.generate(ids, **GREEDY), prompts))
    for got, wanted in zip(answers, expected, strict=True):
        assert torch.equal(got, wanted)
