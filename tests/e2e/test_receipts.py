"""Servers sign for what they take in and send on, and the client finds where it is not the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from streamers import StopServerAt

from planetserve import AutoDistributedModelForCausalLM
from planetserve.client.session import InferenceSession
from planetserve.crypto.channel import EdgeSealer
from planetserve.edge.sender import StepSender
from planetserve.errors import EdgeMismatch, PlanetServeError, ReceiptError, ReceiptMissing
from planetserve.server.receipts import SessionReceipts
from planetserve.server.server import Server
from planetserve.swarm.network import Buffer
from planetserve.testing.swarm import LocalSwarm
from planetserve.verification.digest import EdgeDigest
from planetserve.verification.receipt import RECEIPT_BYTES
from planetserve.wire.frame import FrameHeader, FrameType

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LONG: dict[str, Any] = {"max_new_tokens": 40, **GREEDY}
SHORT: dict[str, Any] = {"max_new_tokens": 5, **GREEDY}
MODES: dict[str, dict[str, Any]] = {
    "greedy": LONG,
    "beams": {"num_beams": 3, **LONG},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, **LONG},
    "chunked prompt": {"prefill_chunk_size": 3, **SHORT},
    "sampling": {**SHORT, "do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture(scope="module")
def signing(llama_folder: Path) -> Iterator[LocalSwarm]:
    """Two servers that give receipts, whose steps come in chunks of four tokens."""
    options = {"receipts": True, "max_batch_size": 16}
    with LocalSwarm(str(llama_folder), ["0:3", "3:6"], options=options) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def asking(llama_folder: Path, signing: LocalSwarm) -> Iterator[Any]:
    with load(llama_folder, signing) as model:
        yield model


def load(folder: Path, swarm: LocalSwarm, **options: Any) -> Any:
    options = {"receipts": True, **options}
    return AutoDistributedModelForCausalLM.from_pretrained(
        str(folder), initial_peers=swarm.initial_peers, **options
    )


def receipts_in(swarm: LocalSwarm) -> list[FrameHeader]:
    return [
        frame.header
        for frame in swarm.frames
        if frame.way == "sent" and frame.header.type is FrameType.RECEIPT
    ]


def run(model: Any, ids: torch.Tensor, **options: Any) -> tuple[Any, Sequence[PlanetServeError]]:
    with model.inference_session() as session:
        output = model.generate(ids, **options)
        settle(model, session)
    return output, session.receipt_errors


def settle(model: Any, *sessions: InferenceSession) -> None:
    """End sessions, and wait for what servers say at the end."""
    for session in sessions:
        model.runtime._loop_thread.call(session.release())


@pytest.mark.parametrize("mode", MODES)
def test_honest_servers_agree(
    signing: LocalSwarm, asking: Any, local: Any, prompt: torch.Tensor, mode: str
) -> None:
    signing.frames.clear()
    ids = prompt if mode == "prompt lookup" else prompt.repeat(2, 1)
    output, errors = run(asking, ids, **MODES[mode])
    assert errors == ()
    if not MODES[mode]["do_sample"]:
        assert torch.equal(output, local.generate(ids, **MODES[mode]))
    sent = receipts_in(signing)
    assert len(sent) >= 2
    assert {header.payload_bytes for header in sent} == {RECEIPT_BYTES}


def test_turns_rollbacks_and_forks_agree(asking: Any, prompt: torch.Tensor) -> None:
    with asking.inference_session() as session:
        asking.generate(prompt, **LONG)
        session.position -= 7
        asking.generate(session.output_ids, **SHORT)
        with session.fork() as fork:
            fork.step(asking.get_input_embeddings()(prompt[:, :3]))
            settle(asking, fork, session)
    assert session.receipt_errors == fork.receipt_errors == ()


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_honest_servers_agree_after_a_hop_was_lost(
    llama_folder: Path, local: Any, prompt: torch.Tensor, hop: int
) -> None:
    spans = ["0:2", "0:2", "2:4", "2:4", "4:6", "4:6"]
    with (
        LocalSwarm(str(llama_folder), spans, options={"receipts": True}) as swarm,
        load(llama_folder, swarm) as model,
    ):
        streamer = StopServerAt(model, swarm, hop, after=30)
        output, errors = run(model, prompt, streamer=streamer, **{**LONG, "max_new_tokens": 70})
        assert streamer.stopped is not None
        assert errors == ()
    assert torch.equal(output, local.generate(prompt, **{**LONG, "max_new_tokens": 70}))


@pytest.mark.parametrize("who", ["client", "first", "last", "nobody"])
def test_whoever_does_not_know_receipts_is_not_asked(
    llama_folder: Path, prompt: torch.Tensor, who: str
) -> None:
    with LocalSwarm(str(llama_folder), []) as swarm:
        swarm.add_server("0:3", receipts=who not in ("first", "nobody"))
        swarm.add_server("3:6", receipts=who not in ("last", "nobody"))
        with load(llama_folder, swarm, receipts=who != "client") as model:
            assert run(model, prompt, **LONG)[1] == ()
        assert bool(receipts_in(swarm)) == (who in ("first", "last"))


class Altering(EdgeSealer):
    """Seals other numbers than its hop has computed."""

    def seal(
        self, header: FrameHeader, parts: Sequence[Buffer], now_s: float
    ) -> tuple[FrameHeader, bytes]:
        tensor = bytearray(parts[1])
        tensor[0] ^= 1
        return super().seal(header, [parts[0], tensor], now_s)


def seal_altered(server: Server, _: pytest.MonkeyPatch) -> None:
    shared = server.handler.shared
    server.handler.shared = dataclasses.replace(
        shared, new_sender=lambda session, dtype: StepSender(session, dtype, new_sealer=Altering)
    )


def deny_input(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SessionReceipts.__init__

    def make(self: SessionReceipts, signer: Any, *rest: Any) -> None:
        made(self, signer, *rest)
        if signer.identity is server.node.identity:
            self.incoming = Denying(self.incoming._session_id, 1)
            self.incoming.start(rest[1].edge, rest[1].epoch, rest[1].first_step)

    monkeypatch.setattr(SessionReceipts, "__init__", make)


class Denying(EdgeDigest):
    """Digests other bytes than have come."""

    def __call__(self, chunk: Any, tensor: memoryview) -> None:
        super().__call__(chunk, memoryview(bytes(len(tensor))))


def sign_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    send = SessionReceipts._send

    async def send_unless(self: SessionReceipts, receipt: Any) -> None:
        if self._signer.identity is not server.node.identity:
            await send(self, receipt)

    monkeypatch.setattr(SessionReceipts, "_send", send_unless)


Cheat = Callable[[Server, pytest.MonkeyPatch], None]
CHEATS: dict[str, tuple[Cheat, int, type[PlanetServeError]]] = {
    "alters between hops": (seal_altered, 0, EdgeMismatch),
    "alters the answer": (seal_altered, 1, ReceiptError),
    "denies what the client sent": (deny_input, 0, ReceiptError),
    "denies what a hop sent": (deny_input, 1, EdgeMismatch),
    "signs nothing": (sign_nothing, 1, ReceiptMissing),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_found_at_the_end(
    llama_folder: Path, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch, cheat: str
) -> None:
    change, index, expected = CHEATS[cheat]
    with LocalSwarm(str(llama_folder), ["0:3", "3:6"], options={"receipts": True}) as swarm:
        change(swarm.servers[index], monkeypatch)
        peers = tuple(server.node.peer_id for server in swarm.servers)
        with load(llama_folder, swarm) as model:
            (error,) = run(model, prompt, **SHORT)[1]
        assert type(error) is expected
        if expected is EdgeMismatch:
            assert error.edge == peers
        else:
            assert error.peer_id == peers[index]


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_found_on_the_way_and_left_alone(
    llama_folder: Path, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch, cheat: str
) -> None:
    """Another server takes over: of what follows, all is signed for."""
    change, index, _ = CHEATS[cheat]
    with LocalSwarm(str(llama_folder), ["0:3", "3:6"], options={"receipts": True}) as swarm:
        change(swarm.servers[index], monkeypatch)
        cheater = swarm.servers[index].node.peer_id
        with load(llama_folder, swarm, ban_timeout=600.0) as model:
            with model.inference_session() as session:
                model.generate(prompt, **SHORT)
                assert cheater in [hop.peer_id for hop in session.chain.hops]
                swarm.add_server("0:3" if index == 0 else "3:6")
                runtime = model.runtime
                runtime._loop_thread.call(runtime._manager.view.refresh())
                model.generate(session.output_ids, **{**LONG, "max_new_tokens": 70})
                chain = [hop.peer_id for hop in session.chain.hops]
                settle(model, session)
            assert session.receipt_errors == ()
        assert cheater not in chain
