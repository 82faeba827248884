"""Models with recurrent layers in a real swarm: beams, speculation, rollbacks, lost servers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.errors import ConfigError
from planetserve.testing.checkpoints import load_local, make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm

GREEDY: dict[str, Any] = {
    "max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module", params=["jamba", "lfm2", "qwen3_next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=3)


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return load_local(folder)


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(str(folder), ["0:2", "1:4"]) as running:
        yield running


@pytest.fixture(scope="module")
def model(folder: Path, swarm: LocalSwarm) -> Iterator[Any]:
    with AutoDistributedModelForCausalLM.from_pretrained(
        str(folder), initial_peers=swarm.initial_peers, torch_dtype=torch.float32
    ) as loaded:
        yield loaded


def test_beams(model: Any, local: Any, padded: dict[str, torch.Tensor]) -> None:
    options = {**GREEDY, "num_beams": 3}
    got = model.generate(**padded, **options)
    assert torch.equal(got, local.generate(**padded, **options))


def test_speculation_changes_no_token(model: Any, local: Any, prompt: torch.Tensor) -> None:
    expected = local.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, **GREEDY, prompt_lookup_num_tokens=4), expected)
    # The model itself drafts in other passes, so some of its drafts are rejected or cut off.
    assert torch.equal(model.generate(prompt, **GREEDY, assistant_model=local), expected)


def test_a_session_goes_back_to_any_position(model: Any, local: Any, prompt: torch.Tensor) -> None:
    new = torch.randint(5, 90, (1, 2), generator=torch.Generator().manual_seed(9))
    with model.inference_session(max_length=60) as session:
        text = torch.cat([prompt, model.generate(prompt, **GREEDY)[:, -16:]], dim=1)
        assert torch.equal(text, local.generate(prompt, **GREEDY))
        for position in (26, 20, 5):
            session.position = position
            whole = torch.cat([text[:, :position], new], dim=1)
            text = local.generate(whole, attention_mask=torch.ones_like(whole), **GREEDY)
            assert torch.equal(model.generate(new, **GREEDY), text[:, position:])


def test_texts_survive_a_lost_server_and_lost_pages(folder: Path, local: Any) -> None:
    limits = {"attn_cache_tokens": 512, "page_size": 4, "kv_overcommit": 8.0, "max_batch_size": 16}
    prompts = [
        torch.randint(5, 90, (1, 15 + 5 * n), generator=torch.Generator().manual_seed(n))
        for n in range(6)
    ]
    with (
        LocalSwarm(str(folder), ["0:2", "0:2", "2:4"], limits) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=swarm.initial_peers, torch_dtype=torch.float32
        ) as model,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        calls = 0

        def stop_at(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 40:
                lost = next(
                    s for s in swarm.servers if s.span.start == 0 and s.handler.num_sessions
                )
                swarm.stop_server(lost)

        model.register_forward_pre_hook(stop_at)
        got = list(pool.map(lambda ids: model.generate(ids, **GREEDY), prompts))
        assert len(swarm.servers) == 2
    for ids, text in zip(prompts, got, strict=True):
        assert torch.equal(text, local.generate(ids, **GREEDY))


def test_a_client_that_would_run_recurrent_layers_is_told_so(
    folder: Path, swarm: LocalSwarm
) -> None:
    with pytest.raises(ConfigError, match="have recurrent layers, which only servers run"):
        AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=swarm.initial_peers, local_blocks="0:1"
        )
