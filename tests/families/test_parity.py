"""Every servable family gives the local model's logits when its layers are spread over servers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from planetserve.check.chain import LocalChain, local_logits
from planetserve.model.checkpoint import Checkpoint
from planetserve.testing.checkpoints import SERVABLE_FAMILIES, load_local, make_tiny_checkpoint
from planetserve.types import BlockSpan

PROMPT_TOKENS = 9
NEW_TOKENS = 4
TOLERANCE = 1e-4


def random_hops(num_blocks: int, rng: random.Random) -> list[tuple[BlockSpan, BlockSpan]]:
    """Cut a model into two to four parts, some held by a server that has blocks around them too."""
    num_cuts = rng.randint(min(1, num_blocks - 1), min(3, num_blocks - 1))
    bounds = [0, *sorted(rng.sample(range(1, num_blocks), num_cuts)), num_blocks]
    hops = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        loaded = BlockSpan(rng.randint(max(0, start - 1), start), rng.randint(end, num_blocks))
        hops.append((loaded, BlockSpan(start, end)))
    return hops


@pytest.mark.parametrize("family", SERVABLE_FAMILIES)
def test_chain_gives_local_logits(family: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, family)
    checkpoint = Checkpoint.open(str(folder))
    local = load_local(folder)
    chain = LocalChain(checkpoint, random_hops(checkpoint.num_blocks, random.Random(family)))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 96, (1, PROMPT_TOKENS + NEW_TOKENS), generator=generator)

    pieces = [ids[:, :PROMPT_TOKENS], *ids[:, PROMPT_TOKENS:].split(1, dim=1)]
    expected = local_logits(local, pieces)
    for piece, logits in zip(pieces, expected, strict=True):
        torch.testing.assert_close(chain.logits(piece), logits, atol=TOLERANCE, rtol=0)

    # The same comparison must notice blocks that run in the wrong order.
    if len(chain.hops) > 1:
        chain.hops.reverse()
        chain.reset()
        error = (chain.logits(pieces[0]) - expected[0]).abs().max()
        assert error > 0.1 * expected[0].std()
