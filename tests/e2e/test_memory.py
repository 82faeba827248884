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
from planetserve.wire.step import RowSlice, StepTable


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


def _pages_used(swarm: LocalSwarm) -> list[int]:
    return [server.engine.stats().pages_used for server in swarm.servers]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 8, "do_sample": False},
        {"num_return_sequences": 8, "do_sample": True},
    ],
    ids=["beams", "answers"],
)
def test_eight_texts_share_the_pages_of_one_long_prompt(
    model: Any, local: Any, swarm: LocalSwarm, options: dict[str, Any]
) -> None:
    prompt = torch.randint(5, 90, (1, 1000), generator=torch.Generator().manual_seed(9))
    settings = {**options, "max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0}
    num_pages = -(-1000 // 16)
    with model.inference_session(max_length=1010) as session:
        torch.manual_seed(2)
        got = model.generate(prompt, **settings)
        used = _pages_used(swarm)
        assert all(num_pages < pages <= num_pages + 8 for pages in used)
        assert len(session.lengths) == 8
    torch.manual_seed(2)
    assert torch.equal(got, local.generate(prompt, **settings))


def test_forks_of_a_session_share_its_pages(
    model: Any, local: Any, swarm: LocalSwarm, prompt: torch.Tensor
) -> None:
    """What no call of `generate()` does: a row filled first, and forked later."""
    ids = prompt.repeat(1, 84)[:, :1001]
    hidden = model.get_input_embeddings()(ids)[0].detach()
    with model.inference_session(max_length=1010) as session:
        session.run(8, StepTable((RowSlice(0, 0, 1000),)), hidden[:1000])
        before = _pages_used(swarm)
        assert before == [63, 63, 63]
        every = StepTable(tuple(RowSlice(row, 1000, 1) for row in range(8)), reorder=(0,) * 8)
        output = session.run(8, every, hidden[1000:].expand(8, -1))
        after = _pages_used(swarm)
        assert all(b < a <= b + 8 for b, a in zip(before, after, strict=True))
    expected = local.model(ids).last_hidden_state[0, -1]
    normed = local.model.norm(output)
    torch.testing.assert_close(normed, expected.expand(8, -1), rtol=1e-3, atol=1e-3)


def test_full_server_refuses_and_small_sessions_still_get_in(
    llama_folder: Path, prompt: torch.Tensor
) -> None:
    options = {"attn_cache_tokens": 128, "inference_max_length": 128, "kv_overcommit": 1.0}
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
