"""What a client finds wrong with receipts, and whom it blames. Hops and steps are written here."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import pytest
import torch
from written_swarm import server

from planetserve.client.ring.receipts import HopReceipts, RingReceipts
from planetserve.crypto.identity import Identity
from planetserve.edge.chunk import StepChunk
from planetserve.errors import (
    EdgeMismatch,
    PlanetServeError,
    ReceiptError,
    ReceiptMissing,
    RemoteProtocolError,
    StreamClosed,
)
from planetserve.types import Hop
from planetserve.verification.digest import EdgeDigest
from planetserve.verification.receipt import RECEIPT_STEPS, Receipt
from planetserve.wire.frame import ANSWER_EDGE, WireDtype
from planetserve.wire.messages import NextHop, Rewire
from planetserve.wire.step import RowSlice, StepTable

SESSION = bytes(range(16))
NONCE = bytes(32)
MANIFEST = "a" * 64

Change = Callable[[Receipt], Receipt]


def unchanged(receipt: Receipt) -> Receipt:
    return receipt


class WrittenHop:
    """A hop that takes in and passes on what the test says, and signs for it."""

    def __init__(self, ring: WrittenRing, index: int, first_step: int = 0, epoch: int = 0):
        self.identity = Identity.generate()
        self.peer_id = self.identity.peer_id
        self.edge = index
        self.lost: PlanetServeError | None = None
        self.change: Change = unchanged
        self.is_silent = False
        hop = Hop(self.peer_id, 2 * index, 2 * index + 2)
        info = server(self.peer_id, hop.start, hop.end, manifest=MANIFEST)
        self.receipts: HopReceipts | None = HopReceipts(
            hop, info, SESSION, NONCE, WireDtype.FLOAT32, ring.receipts.add
        )
        self.incoming, self.outgoing = EdgeDigest(SESSION, 1), EdgeDigest(SESSION, 1)
        self.number = 0
        self.span = (hop.start, hop.end)
        self.incoming.start(self.edge, epoch, first_step)

    def open(self, following: WrittenHop | None, first_step: int = 0, epoch: int = 0) -> None:
        edge = ANSWER_EDGE if following is None else following.edge
        self.outgoing.start(edge, epoch, first_step)
        assert self.receipts is not None
        self.receipts.opened(self.edge, epoch, as_next(following), first_step)

    def receipt(self, *, is_final: bool = False) -> bytes:
        number, self.number = self.number, self.number + 1
        receipt = Receipt(
            SESSION, NONCE, *self.span, WireDtype.FLOAT32, 0, bytes.fromhex(MANIFEST), number,
            is_final, self.incoming.state(with_rows=is_final),
            self.outgoing.state(with_rows=is_final), 1, 2,
        )  # fmt: skip
        return self.change(receipt).sign(self.identity)

    def sign(self, *, is_final: bool = False) -> None:
        """Send a receipt, which the client's reader takes."""
        assert self.receipts is not None
        try:
            self.receipts.take(self.receipt(is_final=is_final))
        except PlanetServeError as error:
            self.lost = error
            raise

    async def finish(self, _timeout_s: float) -> None:
        assert self.receipts is not None
        self.receipts.is_asked_last = True
        if not self.is_silent:
            try:
                self.sign(is_final=True)
            except PlanetServeError:
                return


def as_next(hop: WrittenHop | None) -> NextHop | None:
    if hop is None:
        return None
    return NextHop(peer_id=hop.peer_id, edge=hop.edge, fresh=True, end=2, addresses=[])


class WrittenRing:
    """A client and hops; `step` takes a step around."""

    def __init__(self, num_hops: int = 2):
        self.receipts = RingReceipts(SESSION, 1)
        self.hops = [WrittenHop(self, index) for index in range(num_hops)]
        self.number = 0
        for index, hop in enumerate(self.hops):
            hop.open(self.hops[index + 1] if index + 1 < num_hops else None)
        self.receipts.sent.start(0, 0, 0)
        self.receipts.received.start(ANSWER_EDGE, 0, 0)

    def step(self, *, tampers: int | None = None) -> None:
        """One token. After the hop `tampers` it is another on the edge, unknown to its sender."""
        value = 1.0
        put(self.receipts.sent, self.number, value)
        for index, hop in enumerate(self.hops):
            put(hop.incoming, self.number, value)
            value += 1
            put(hop.outgoing, self.number, value)
            value += 0.5 * (index == tampers)
        put(self.receipts.received, self.number, value)
        self.number += 1

    def steps(self, count: int, *, tampers: int | None = None) -> None:
        """Some steps, for which all hops sign when it is due."""
        for _ in range(count):
            self.receipts.check_due(self.hops, self.number)
            self.step(tampers=tampers)
            if self.number % RECEIPT_STEPS == 0:
                for hop in self.hops:
                    if not hop.is_silent:
                        hop.sign()

    async def settle(self) -> list[PlanetServeError]:
        return await self.receipts.settle(self.hops)

    def replace(self, index: int, *, is_half_way: bool) -> None:
        """Put another hop in, maybe while the last step is under way."""
        first_step = self.number - is_half_way
        before = self.hops[index - 1] if index else None
        after = self.hops[index + 1] if index + 1 < len(self.hops) else None
        hop = self.hops[index] = WrittenHop(self, len(self.hops) + index, first_step, epoch=1)
        hop.span = (2 * hop.edge, 2 * hop.edge + 2)
        hop.open(after, first_step, epoch=1)
        message = {"epoch": 1, "first_step": first_step, "max_chunk_tokens": 16}
        if before is None:
            self.receipts.sent.start(hop.edge, 1, first_step)
        else:
            before.outgoing.start(hop.edge, 1, first_step)
            assert before.receipts is not None
            before.receipts.rewired(Rewire(previous=None, next=as_next(hop), **message))
        if after is None:
            self.receipts.received.start(ANSWER_EDGE, 1, first_step)
        else:
            after.incoming.start(after.edge, 1, first_step)
            assert after.receipts is not None
            after.receipts.rewired(Rewire(previous=hop.peer_id, next=None, **message))
        if is_half_way:
            self._send_again(first_step, before, hop, after)

    def _send_again(
        self, number: int, before: WrittenHop | None, hop: WrittenHop, after: WrittenHop | None
    ) -> None:
        """The step under way, from the replaced hop's predecessor to the one after it, which has
        it already."""
        value = 1.0 + self.hops.index(hop)
        put(self.receipts.sent if before is None else before.outgoing, number, value)
        put(hop.incoming, number, value)
        put(hop.outgoing, number, value + 1)
        if after is None:
            put(self.receipts.received, number, value + 1)
        if (number + 1) % RECEIPT_STEPS == 0:
            hop.sign()
            if before is not None:
                before.sign()


def put(digest: EdgeDigest, number: int, value: float) -> None:
    hidden_TD = torch.full((1, 2), value)
    table = StepTable((RowSlice(0, number, 1),))
    digest(StepChunk(number, 0, 1, 0, table, hidden_TD), memoryview(hidden_TD.numpy()).cast("B"))


@pytest.mark.parametrize("num_steps", [0, 1, 31, 32, 33, 70])
@pytest.mark.parametrize("num_hops", [1, 2, 3])
async def test_honest_hops_agree(num_hops: int, num_steps: int) -> None:
    ring = WrittenRing(num_hops)
    ring.steps(num_steps)
    assert await ring.settle() == []
    assert ring.receipts._waiting == {}


async def test_a_hop_that_has_signed_for_something_else_than_the_client_sent() -> None:
    ring = WrittenRing()
    put(ring.hops[0].incoming, 0, 9.0)
    put(ring.hops[0].incoming, 0, 1.0)
    ring.hops[0].incoming.start(0, 0, 0)
    put(ring.hops[0].incoming, 0, 9.0)
    put(ring.receipts.sent, 0, 1.0)
    (error, *_) = await ring.settle()
    assert isinstance(error, ReceiptError)
    assert error.peer_id == ring.hops[0].peer_id


@pytest.mark.parametrize("num_steps", [1, 40])
async def test_a_last_hop_that_denies_what_it_has_sent(num_steps: int) -> None:
    ring = WrittenRing()
    if num_steps > RECEIPT_STEPS:
        with pytest.raises(ReceiptError) as caught:
            ring.steps(num_steps, tampers=1)
        assert caught.value.peer_id == ring.hops[1].peer_id
        return
    ring.steps(num_steps, tampers=1)
    (error,) = await ring.settle()
    assert isinstance(error, ReceiptError)
    assert error.peer_id == ring.hops[1].peer_id


@pytest.mark.parametrize("num_steps", [1, 40])
async def test_neither_of_two_hops_is_blamed_for_their_edge(num_steps: int) -> None:
    ring = WrittenRing()
    ends = (ring.hops[0].peer_id, ring.hops[1].peer_id)
    if num_steps > RECEIPT_STEPS:
        with pytest.raises(EdgeMismatch) as caught:
            ring.steps(num_steps, tampers=0)
        error: PlanetServeError = caught.value
    else:
        ring.steps(num_steps, tampers=0)
        (error,) = await ring.settle()
    assert isinstance(error, EdgeMismatch)
    assert (error.edge, error.peer_id) == (ends, None)


async def test_a_hop_that_signs_nothing() -> None:
    ring = WrittenRing()
    ring.hops[0].is_silent = True
    ring.steps(RECEIPT_STEPS + 5)
    with pytest.raises(ReceiptMissing) as caught:
        ring.steps(RECEIPT_STEPS)
    assert caught.value.peer_id == ring.hops[0].peer_id
    (error,) = await ring.settle()
    assert isinstance(error, ReceiptMissing)
    assert error.peer_id == ring.hops[0].peer_id


async def test_a_hop_that_goes_before_its_last_receipt() -> None:
    ring = WrittenRing()
    ring.steps(3)
    ring.hops[1].is_silent = True
    ring.hops[1].lost = StreamClosed("gone")
    (error,) = await ring.settle()
    assert isinstance(error, ReceiptMissing)
    assert error.peer_id == ring.hops[1].peer_id


async def test_hops_that_give_no_receipts_are_not_asked() -> None:
    ring = WrittenRing(3)
    ring.hops[1].receipts = None
    for _ in range(100):
        ring.receipts.check_due(ring.hops, ring.number)
        ring.step()
        if ring.number % RECEIPT_STEPS == 0:
            for hop in (ring.hops[0], ring.hops[2]):
                hop.sign()
    assert await ring.settle() == []
    assert len(ring.receipts._waiting) < 10


@pytest.mark.parametrize("is_half_way", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [1, 31, 32, 45])
async def test_a_hop_that_comes_later_signs_for_what_it_has_seen(
    num_steps: int, index: int, is_half_way: bool
) -> None:
    ring = WrittenRing(3)
    ring.steps(num_steps)
    ring.replace(index, is_half_way=is_half_way)
    ring.steps(70)
    assert await ring.settle() == []


def altered(**fields: object) -> Change:
    return lambda receipt: dataclasses.replace(receipt, **fields)  # type: ignore[arg-type]


def state_altered(side: str, **fields: object) -> Change:
    def change(receipt: Receipt) -> Receipt:
        state = dataclasses.replace(getattr(receipt, side), **fields)
        return dataclasses.replace(receipt, **{side: state})

    return change


WRONG: dict[str, Change] = {
    "session": altered(session_id=bytes(16)),
    "nonce": altered(nonce=bytes(range(32))),
    "blocks": altered(end=9),
    "dtype": altered(dtype=WireDtype.BFLOAT16),
    "quantisation": altered(quant=1),
    "other weights": altered(manifest=bytes(range(32))),
    "number": altered(number=7),
    "last before the end": altered(is_final=True),
    "edge": state_altered("outgoing", edge=5),
    "epoch": state_altered("incoming", epoch=1),
    "an earlier step": state_altered("outgoing", next_step=31),
    "a later step": state_altered("outgoing", next_step=64),
    "another step came in": state_altered("incoming", next_step=33),
    "tokens": state_altered("incoming", num_tokens=31),
    "chain": state_altered("incoming", chain=bytes(32)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_a_receipt_may_not_say(kind: str) -> None:
    ring = WrittenRing()
    ring.hops[0].change = WRONG[kind]
    with pytest.raises(ReceiptError) as caught:
        ring.steps(RECEIPT_STEPS)
    assert caught.value.peer_id == ring.hops[0].peer_id


def test_weights_that_a_server_does_not_know_are_no_lie() -> None:
    ring = WrittenRing()
    ring.hops[0].change = altered(manifest=bytes(32))
    ring.steps(RECEIPT_STEPS)


def test_a_receipt_comes_once() -> None:
    ring = WrittenRing()
    ring.steps(RECEIPT_STEPS)
    with pytest.raises(ReceiptError, match="steps that are due"):
        ring.hops[0].sign()


def test_a_receipt_for_steps_that_nobody_has_sent() -> None:
    ring = WrittenRing(1)
    for number in range(RECEIPT_STEPS):
        put(ring.hops[0].incoming, number, 1.0)
        put(ring.hops[0].outgoing, number, 1.0)
    with pytest.raises(ReceiptError):
        ring.hops[0].sign()


async def test_a_last_receipt_for_other_steps_than_the_neighbours() -> None:
    ring = WrittenRing(3)
    ring.steps(5)
    ring.hops[1].change = state_altered("incoming", next_step=4)
    (error,) = await ring.settle()
    assert isinstance(error, EdgeMismatch)
    assert error.edge == (ring.hops[0].peer_id, ring.hops[1].peer_id)


async def test_a_last_receipt_for_other_rows() -> None:
    ring = WrittenRing(1)
    ring.steps(5)
    ring.hops[0].change = state_altered("incoming", rows=bytes(32))
    (error,) = await ring.settle()
    assert isinstance(error, ReceiptError)


def test_what_is_no_receipt_is_refused() -> None:
    ring = WrittenRing()
    assert ring.hops[0].receipts is not None
    for payload in (b"", b"{}", bytes(336), bytes(64 * 1024)):
        with pytest.raises(RemoteProtocolError):
            ring.hops[0].receipts.take(payload)


async def test_nothing_is_left_running() -> None:
    ring = WrittenRing()
    ring.steps(3)
    await ring.settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}
