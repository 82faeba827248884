"""Every servable family, through a real swarm, equals the local model in float32.

Each family's tiny random checkpoint is cut into 2 to 4 random spans, sometimes overlapping, on as
many servers. A first difference between greedy tokens may stand only where the local model's two
best logits are within 1e-4 of each other.

Where the rotary embedding depends on the longest position in a pass (dynamic NTK, longrope), local
transformers lets the longest row of a batch, and even an earlier call, change every other row. The
swarm computes each row as if it were alone, and so does the reference here.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.check.chain import local_logits
from planetserve.errors import ModelError
from planetserve.model.capabilities import constant_rotary_length
from planetserve.model.text_config import text_config
from planetserve.testing.checkpoints import (
    REFUSED_FAMILIES,
    SERVABLE_FAMILIES,
    load_local,
    make_tiny_checkpoint,
)
from planetserve.testing.swarm import LocalSwarm

OPTIONS: dict[str, Any] = {
    "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
}  # fmt: skip
TIE = 1e-4


def _random_spans(seed: int, num_blocks: int) -> list[str]:
    chooser = random.Random(seed)
    num_spans = min(num_blocks, chooser.randint(2, 4))
    cuts = sorted(chooser.sample(range(1, num_blocks), num_spans - 1))
    bounds = [0, *cuts, num_blocks]
    spans = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        wider = min(num_blocks, end + chooser.randint(0, 1))
        spans.append(f"{start}:{wider}")
    return spans


def _assert_same_tokens(
    got: torch.Tensor, folder: Path, ids: torch.Tensor, mask: torch.Tensor, alone: bool
) -> None:
    """Compare with a local model; `alone` computes each row with a fresh one."""
    groups = [slice(row, row + 1) for row in range(len(ids))] if alone else [slice(None)]
    for rows in groups:
        local = load_local(folder)
        expected = local.generate(
            ids[rows], attention_mask=mask[rows], **OPTIONS, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        for row, tokens in enumerate(got[rows]):
            different = (tokens != expected.sequences[row]).nonzero()
            if not len(different):
                continue
            step = int(different[0]) - (got.shape[1] - len(expected.logits))
            best = expected.logits[step][row].topk(2).values
            assert best[0] - best[1] < TIE, f"row {row}, step {step}, best {best.tolist()}"


@pytest.mark.parametrize("family", SERVABLE_FAMILIES)
def test_family_equals_local(family: str, tmp_path: Path) -> None:
    seed = zlib.crc32(family.encode())
    make_tiny_checkpoint(tmp_path, family, seed=seed)
    local = load_local(tmp_path)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    ids[2, :2], mask[2, :2] = 0, 0
    alone = constant_rotary_length(text_config(local.config)) is not None
    spans = _random_spans(seed, text_config(local.config).num_hidden_layers)
    with (
        LocalSwarm(str(tmp_path), spans) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(tmp_path), initial_peers=swarm.initial_peers, torch_dtype=torch.float32
        ) as model,
        torch.no_grad(),
    ):
        single = model.generate(ids[:1], **OPTIONS)
        _assert_same_tokens(single, tmp_path, ids[:1], mask[:1], alone)
        batch = model.generate(ids, attention_mask=mask, **OPTIONS)
        _assert_same_tokens(batch, tmp_path, ids, mask, alone)
        torch.testing.assert_close(
            model(ids[:1]).logits, local(ids[:1]).logits, atol=1e-4, rtol=1e-4
        )
        out = model(ids[:1, :5])
        rest = model(ids[:1, 5:], past_key_values=out.past_key_values).logits
        expected = local_logits(load_local(tmp_path), [ids[:1, :5], ids[:1, 5:]])[1]
        torch.testing.assert_close(rest, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_refused_family_says_why(family: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, family)
    with pytest.raises(ModelError, match="cannot be served: ") as caught:
        AutoDistributedModelForCausalLM.from_pretrained(
            str(tmp_path), initial_peers=["/ip4/127.0.0.1/tcp/9/p2p/nobody"]
        )
    assert "\n" not in str(caught.value)
