"""Whom a client lets compute what: local blocks, trusted, allowed and blocked servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from planetserve import AutoDistributedModelForCausalLM
from planetserve.client.hf.local_blocks import LocalRows
from planetserve.errors import ConfigError, MissingBlocksError, SessionClosed
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


def _load(folder: Path, swarm: LocalSwarm, **options: Any) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(
        str(folder), initial_peers=swarm.initial_peers, torch_dtype=torch.float32, **options
    )


def _peer_ids(swarm: LocalSwarm) -> list[str]:
    return [server.node.peer_id for server in swarm.servers]


class _At(BaseStreamer):
    """Does something once, when token `after` is out."""

    def __init__(self, after: int, action: Callable[[], None]):
        self.after, self.action = after, action

    def put(self, value: torch.Tensor) -> None:
        self.after -= 1
        if self.after == 0:
            self.action()

    def end(self) -> None:
        return


@pytest.fixture(scope="module", params=["0:1", "-2:", "0:1,5:6"])
def partial(request: Any, swarm: LocalSwarm, llama_folder: Path) -> Iterator[Any]:
    """A model whose first block, last two blocks, or both ends run in the client."""
    with _load(llama_folder, swarm, local_blocks=request.param) as loaded:
        yield loaded


def test_greedy_with_local_blocks(partial: Any, local: Any, prompt: torch.Tensor) -> None:
    assert torch.equal(partial.generate(prompt, **GREEDY), local.generate(prompt, **GREEDY))


def test_padded_beams_with_local_blocks(
    partial: Any, local: Any, padded: dict[str, torch.Tensor]
) -> None:
    options = {**GREEDY, "num_beams": 3, "pad_token_id": 0}
    assert torch.equal(partial.generate(**padded, **options), local.generate(**padded, **options))


def test_assistant_with_local_blocks(partial: Any, local: Any, prompt: torch.Tensor) -> None:
    # Candidates looked up in the prompt are mostly wrong, so that most steps are rolled back.
    ids = torch.cat([prompt, prompt], dim=1)
    expected = local.generate(ids, **GREEDY)
    assert torch.equal(partial.generate(ids, **GREEDY, assistant_model=local), expected)
    assert torch.equal(partial.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), expected)


def test_session_with_local_blocks_goes_on_and_back(
    partial: Any, local: Any, prompt: torch.Tensor
) -> None:
    expected = local.generate(prompt, **GREEDY)
    with partial.inference_session(max_length=64) as session:
        first = partial.generate(prompt, max_new_tokens=4, do_sample=False)
        rest = partial.generate(None, max_new_tokens=6, do_sample=False)
        assert torch.equal(torch.cat([first, rest], dim=1), expected)
        hidden_1TD = local.model.embed_tokens(expected[:, 8:12]).detach()
        session.position = 8
        once = session.step(hidden_1TD)
        session.position = 8
        assert torch.equal(session.step(hidden_1TD), once)


def test_logits_with_local_blocks(
    partial: Any, local: Any, padded: dict[str, torch.Tensor]
) -> None:
    got, expected = partial(**padded).logits, local(**padded).logits
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)


def test_the_ring_covers_the_remote_blocks_only(
    swarm: LocalSwarm, llama_folder: Path, prompt: torch.Tensor
) -> None:
    with _load(llama_folder, swarm, local_blocks="0:1,5:6") as model:
        swarm.frames.clear()
        model.generate(prompt, **GREEDY)
        hops = model.chain.hops
        seen = [frame.header for frame in swarm.frames if frame.way == "received"]
    assert [hops[0].start, hops[-1].end] == [1, 5]
    assert all(a.end == b.start for a, b in zip(hops, hops[1:], strict=False))
    spans = {(header.span_start, header.span_end) for header in seen if header.num_tokens}
    assert spans == {(hop.start, hop.end) for hop in hops}


@pytest.mark.parametrize("local_blocks", ["0:1", "0:1,5:6"])
def test_a_lost_hop_with_local_blocks(
    llama_folder: Path, local: Any, padded: dict[str, torch.Tensor], local_blocks: str
) -> None:
    options = {**GREEDY, "num_beams": 2, "pad_token_id": 0}
    with (
        LocalSwarm(str(llama_folder), ["0:6", "0:6"]) as swarm,
        _load(llama_folder, swarm, local_blocks=local_blocks) as model,
    ):
        calls = 0
        lost = None

        def stop_at_fourth(*_: Any) -> None:
            nonlocal calls, lost
            calls += 1
            if calls == 4:
                lost = model.chain.hops[0].peer_id
                (server,) = [s for s in swarm.servers if s.node.peer_id == lost]
                swarm.stop_server(server)

        model.register_forward_pre_hook(stop_at_fourth)
        got = model.generate(**padded, **options)
        assert lost is not None
        assert lost not in [hop.peer_id for hop in model.chain.hops]
    assert torch.equal(got, local.generate(**padded, **options))


@pytest.mark.parametrize("local_blocks", ["0:6", "0:4,3:6", ":"])
def test_all_blocks_local_needs_no_swarm(llama_folder: Path, local_blocks: str) -> None:
    with pytest.raises(ConfigError, match="no swarm is needed"):
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=["/ip4/127.0.0.1/tcp/1"], local_blocks=local_blocks
        )


def test_missing_blocks_have_their_true_numbers(llama_folder: Path) -> None:
    with (
        LocalSwarm(str(llama_folder), ["0:3"]) as swarm,
        _load(llama_folder, swarm, local_blocks="0:1,5:6", wait_for_blocks_timeout=0) as model,
        pytest.raises(MissingBlocksError, match="blocks 3:5 of") as caught,
    ):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
    assert caught.value.missing == ((3, 5),)


def test_only_trusted_servers_run_trusted_blocks(
    llama_folder: Path, local: Any, prompt: torch.Tensor
) -> None:
    with LocalSwarm(str(llama_folder), ["0:6", "0:3", "4:6"]) as swarm:
        first, last = _peer_ids(swarm)[1:]
        with _load(
            llama_folder, swarm, trusted_servers=[first, last], trusted_blocks="0:2,-1:"
        ) as model:
            got = model.generate(prompt, **GREEDY)
            hops = model.chain.hops
        hosts = {block: hop.peer_id for hop in hops for block in range(hop.start, hop.end)}
        assert {hosts[0], hosts[1]} == {first}
        assert hosts[5] == last
        assert torch.equal(got, local.generate(prompt, **GREEDY))


def test_trust_and_local_blocks_together(
    llama_folder: Path, local: Any, prompt: torch.Tensor
) -> None:
    with LocalSwarm(str(llama_folder), ["0:6", "0:3"]) as swarm:
        trusted = _peer_ids(swarm)[1]
        with _load(
            llama_folder,
            swarm,
            local_blocks="0:1,-2:",
            trusted_servers=[trusted],
            trusted_blocks="0:2,5:6",
        ) as model:
            got = model.generate(prompt, **GREEDY)
            hops = model.chain.hops
    assert [hops[0].start, hops[-1].end] == [1, 4]
    assert hops[0].peer_id == trusted
    assert torch.equal(got, local.generate(prompt, **GREEDY))


@pytest.mark.parametrize(
    ("setting", "others"),
    [("blocked_servers", False), ("allowed_servers", True), ("trusted_servers", True)],
)
def test_a_filter_holds_when_its_last_server_is_lost(
    llama_folder: Path, prompt: torch.Tensor, setting: str, others: bool
) -> None:
    """The refused server could run every block, and is not asked to."""
    with LocalSwarm(str(llama_folder), ["0:6", "0:6"]) as swarm:
        refused, kept = _peer_ids(swarm)
        options = {setting: [kept if others else refused], "wait_for_blocks_timeout": 0}
        if setting == "trusted_servers":
            options["trusted_blocks"] = "0:2"
        with _load(llama_folder, swarm, **options) as model:
            assert model.generate(prompt, **GREEDY).shape[1] > prompt.shape[1]
            assert model.chain.hops[0].peer_id == kept
            (server,) = [s for s in swarm.servers if s.node.peer_id == kept]
            streamer = _At(4, lambda: swarm.stop_server(server))
            swarm.frames.clear()
            with pytest.raises(MissingBlocksError, match=f"ruled out by {setting}"):
                model.generate(prompt, **GREEDY, streamer=streamer)
        steps = [f.header for f in swarm.frames if f.node == refused and f.way == "received"]
        assert not [header for header in steps if header.num_tokens and header.span_start < 2]


@pytest.mark.parametrize("name", ["allowed_servers", "blocked_servers", "trusted_servers"])
def test_a_mistyped_peer_id_is_refused(name: str, llama_folder: Path, swarm: LocalSwarm) -> None:
    right = _peer_ids(swarm)[0]
    for wrong in (right[:-1], f"/p2p/{right}", "server-1"):
        with pytest.raises(ConfigError, match=f"{name}: .* is no peer id"):
            _load(llama_folder, swarm, **{name: [right, wrong]})


def test_a_blocked_server_is_not_used(llama_folder: Path, local: Any, prompt: torch.Tensor) -> None:
    with LocalSwarm(str(llama_folder), ["0:6", "0:3", "3:6"]) as swarm:
        blocked, *others = _peer_ids(swarm)
        for options in ({"blocked_servers": [blocked]}, {"allowed_servers": others}):
            with _load(llama_folder, swarm, **options) as model:
                got = model.generate(prompt, **GREEDY)
                assert [hop.peer_id for hop in model.chain] == others
            assert torch.equal(got, local.generate(prompt, **GREEDY))


def test_a_failure_in_the_last_blocks_ends_the_session(
    swarm: LocalSwarm, llama_folder: Path, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers hold a step that the client does not, so nothing may follow it."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with (
        _load(llama_folder, swarm, local_blocks="-1:") as model,
        model.inference_session(max_length=32) as session,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(LocalRows, "run_last", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(prompt, **GREEDY)
        with pytest.raises(SessionClosed):
            model.generate(prompt, session=session, **GREEDY)


@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v2", "opt"])
def test_local_blocks_of_other_families(family: str, tmp_path: Path) -> None:
    """Scaled embeddings and sliding windows, latent attention with experts, learned positions."""
    make_tiny_checkpoint(tmp_path, family, seed=4)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    num_blocks = whole.config.num_hidden_layers
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    with (
        LocalSwarm(str(tmp_path), [f"0:{num_blocks}"]) as swarm,
        _load(tmp_path, swarm, local_blocks="0:1,-1:") as model,
        torch.no_grad(),
    ):
        got = model(ids, attention_mask=mask).logits[mask.bool()]
        row = model.generate(ids[:1], **GREEDY, pad_token_id=0)
        assert [model.chain.hops[0].start, model.chain.hops[-1].end] == [1, num_blocks - 1]
        torch.testing.assert_close(
            got, whole(ids, attention_mask=mask).logits[mask.bool()], atol=1e-4, rtol=1e-4
        )
        assert torch.equal(row, whole.generate(ids[:1], **GREEDY, pad_token_id=0))
