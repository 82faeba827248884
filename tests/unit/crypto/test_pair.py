"""Peers in memory: a client and hops open a session, send keys and pass frames over bad links."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planetserve.crypto.channel import EdgeOpener, EdgeSealer
from planetserve.crypto.handshake import ClientHandshake, answer_open
from planetserve.crypto.identity import Identity
from planetserve.crypto.secrets import (
    ChannelSecret,
    new_edge_secret,
    open_edge_keys,
    seal_edge_keys,
    wipe,
)
from planetserve.errors import DecryptionFailed, RemoteProtocolError
from planetserve.wire.frame import HEADER_BYTES, Direction, FrameHeader, FrameType

SESSION = bytes(range(16))
FORWARD = Direction.FORWARD
IDENTITIES = [Identity.generate() for _ in range(4)]


def pack_frame(end: EdgeSealer, header: FrameHeader, plaintext: bytes) -> bytes:
    """What goes over the wire."""
    header, payload = end.seal(header, [plaintext], 0.0)
    return header.pack() + payload


def open_frame(end: EdgeOpener, frame: bytes) -> bytearray:
    """What a receiver does with it, header first."""
    return end.open(FrameHeader.unpack(frame[:HEADER_BYTES]), bytearray(frame[HEADER_BYTES:]))


def step(edge: int, epoch: int, number: int) -> FrameHeader:
    return FrameHeader(
        FrameType.STEP, session=SESSION, edge=edge, epoch=epoch, step=number, position=number
    )


class Hop:
    """A hop's keys, from OPEN to the end; `work` stands for what it computes."""

    def __init__(self, identity: Identity, edge: int):
        self.identity = identity
        self.edge = edge
        self.channel: ChannelSecret | None = None

    def on_open(self, payload: bytes, offer: bytes) -> tuple[bytes, bytes]:
        answer, signature, self.channel = answer_open(
            self.identity, SESSION, self.edge, payload, offer
        )
        return answer, signature

    def on_edge_keys(self, blob: bytes) -> None:
        assert self.channel is not None
        self.epoch, inbound, outbound = open_edge_keys(self.channel, blob)
        self.opener = EdgeOpener(inbound, SESSION, self.edge, self.epoch, FORWARD)
        self.sealer = EdgeSealer(outbound, SESSION, self.edge + 1, self.epoch, FORWARD, 0.0)
        wipe(inbound, outbound)

    def on_step(self, frame: bytes) -> bytes | None:
        header = FrameHeader.unpack(frame[:HEADER_BYTES])
        if header.epoch < self.epoch:
            return None
        plaintext = open_frame(self.opener, frame)
        out = step(self.edge + 1, self.epoch, header.step)
        return pack_frame(self.sealer, out, self.work(plaintext))

    def work(self, plaintext: bytearray) -> bytes:
        return bytes(plaintext) + bytes([self.edge])


class Client:
    """A client's keys for a ring of `hops`."""

    def __init__(self, hops: list[Hop]):
        self.hops = hops
        self.epoch = -1
        self.channels = [self._open(hop) for hop in hops]

    def _open(self, hop: Hop) -> ChannelSecret:
        handshake = ClientHandshake(SESSION, hop.edge, hop.identity.peer_id)
        payload = b"OPEN with " + handshake.offer.hex().encode()
        answer, signature = hop.on_open(payload, handshake.offer)
        return handshake.finish(payload, answer, signature)

    def replace(self, index: int, identity: Identity) -> None:
        self.hops[index] = Hop(identity, index)
        self.channels[index] = self._open(self.hops[index])

    def send_edge_keys(self) -> None:
        """Start the next epoch."""
        self.epoch += 1
        last = len(self.hops)
        secrets = [new_edge_secret() for _ in range(last + 1)]
        for hop, channel in zip(self.hops, self.channels, strict=True):
            pair = secrets[hop.edge], secrets[hop.edge + 1]
            hop.on_edge_keys(seal_edge_keys(channel, self.epoch, *pair))
        self.sealer = EdgeSealer(secrets[0], SESSION, 0, self.epoch, FORWARD, 0.0)
        self.opener = EdgeOpener(secrets[last], SESSION, last, self.epoch, FORWARD)
        wipe(*secrets)

    def round_trip(self, number: int, plaintext: bytes) -> bytes:
        frame = pack_frame(self.sealer, step(0, self.epoch, number), plaintext)
        for hop in self.hops:
            answer = hop.on_step(frame)
            assert answer is not None
            assert plaintext not in answer
            frame = answer
        return bytes(open_frame(self.opener, frame))


def ring(num_hops: int = 3) -> Client:
    client = Client([Hop(IDENTITIES[index], index) for index in range(num_hops)])
    client.send_edge_keys()
    return client


@pytest.mark.parametrize("num_hops", [1, 2, 3])
def test_steps_travel_round_the_ring(num_hops: int) -> None:
    client = ring(num_hops)
    for number in range(5):
        text = b"hidden states %d" % number
        assert client.round_trip(number, text) == text + bytes(range(num_hops))


def test_a_replaced_hop_joins_under_the_next_epoch() -> None:
    client = ring()
    client.round_trip(0, b"before")
    client.replace(1, IDENTITIES[3])
    client.send_edge_keys()
    assert client.epoch == 1
    assert client.round_trip(1, b"after") == b"after\x00\x01\x02"
    client.send_edge_keys()
    assert client.round_trip(2, b"later") == b"later\x00\x01\x02"


def test_late_frames_of_an_old_epoch_are_dropped_and_harm_nothing() -> None:
    client = ring()
    late = pack_frame(client.sealer, step(0, 0, 0), b"late frame")
    client.send_edge_keys()
    assert client.hops[0].on_step(late) is None
    assert client.round_trip(1, b"on time") == b"on time\x00\x01\x02"


def test_a_frame_of_an_old_epoch_does_not_pass_under_the_new_number() -> None:
    client = ring()
    late = bytearray(pack_frame(client.sealer, step(0, 0, 0), b"late frame"))
    client.send_edge_keys()
    late[24:28] = (1).to_bytes(4, "big")
    with pytest.raises(DecryptionFailed):
        client.hops[0].on_step(bytes(late))


def test_a_hop_that_left_can_read_nothing_of_the_next_epoch() -> None:
    client = ring()
    gone = client.hops[1]
    client.replace(1, IDENTITIES[3])
    client.send_edge_keys()
    frame = client.hops[0].on_step(pack_frame(client.sealer, step(0, 1, 0), b"secret"))
    assert frame is not None
    gone.opener = EdgeOpener(bytes(32), SESSION, 1, 1, FORWARD)
    with pytest.raises(DecryptionFailed):
        gone.opener.open(FrameHeader.unpack(frame[:HEADER_BYTES]), bytearray(frame[HEADER_BYTES:]))


def test_a_hop_cannot_play_the_client_or_its_neighbour_elsewhere() -> None:
    client = ring()
    first, second, third = client.hops
    frame = first.on_step(pack_frame(client.sealer, step(0, 0, 0), b"states"))
    assert frame is not None
    # The second hop holds the secrets of edges 1 and 2: nothing it can seal enters at 0 or 3.
    forged = pack_frame(second.sealer, step(2, 0, 0), b"forged")
    for opener, edge in ((first.opener, 0), (client.opener, 3)):
        relabelled = bytearray(forged)
        relabelled[20:22] = edge.to_bytes(2, "big")
        with pytest.raises(DecryptionFailed):
            open_frame(opener, bytes(relabelled))
    assert third.on_step(forged) is not None


def test_a_frame_sent_back_to_its_sender_is_refused() -> None:
    secret = new_edge_secret()
    sealer = EdgeSealer(secret, SESSION, 1, 0, FORWARD, 0.0)
    back = EdgeOpener(secret, SESSION, 1, 0, Direction.BACKWARD)
    frame = bytearray(pack_frame(sealer, step(1, 0, 0), b"states"))
    frame[22] = Direction.BACKWARD
    with pytest.raises(DecryptionFailed):
        open_frame(back, bytes(frame))


@dataclass(frozen=True)
class Fault:
    """What a bad link does to the frame at `index` of those in flight."""

    kind: str
    index: int
    at: int
    value: int

    def apply(self, frames: list[bytes]) -> None:
        if not frames:
            return
        index = self.index % len(frames)
        frame = frames[index]
        if self.kind == "lose":
            del frames[index]
        elif self.kind == "repeat":
            frames.insert(self.at % (len(frames) + 1), frame)
        elif self.kind == "move":
            frames.insert(self.at % len(frames), frames.pop(index))
        elif self.kind == "extend" or not frame:  # of nothing, nothing can be cut or changed
            frames[index] = frame + bytes([self.value])
        elif self.kind == "cut":
            frames[index] = frame[: self.at % len(frame)]
        elif self.kind == "change":
            changed = bytearray(frame)
            changed[self.at % len(frame)] ^= self.value or 1
            frames[index] = bytes(changed)
        else:
            frames.insert(index, bytes(changed_byte ^ self.value for changed_byte in frame))


FAULTS = st.builds(
    Fault,
    st.sampled_from(["lose", "repeat", "move", "cut", "extend", "change", "inject"]),
    st.integers(0, 20),
    st.integers(0, 500),
    st.integers(0, 255),
)


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=8), st.lists(FAULTS, max_size=4))
def test_what_comes_through_a_bad_link_is_a_beginning_of_what_was_sent(
    sent: list[bytes], faults: list[Fault]
) -> None:
    secret = new_edge_secret()
    sealer = EdgeSealer(secret, SESSION, 1, 0, FORWARD, 0.0)
    opener = EdgeOpener(secret, SESSION, 1, 0, FORWARD)
    good = [pack_frame(sealer, step(1, 0, number), text) for number, text in enumerate(sent)]
    frames = list(good)
    for fault in faults:
        fault.apply(frames)

    received: list[bytes] = []
    refused = False
    for frame in frames:
        try:
            text = bytes(open_frame(opener, frame))
        except RemoteProtocolError:
            # The stream is closed here: nothing of it is read any more.
            refused = True
            break
        except DecryptionFailed:
            refused = True
        else:
            assert not refused
            received.append(text)

    # Everything up to the first deviation arrives, and nothing after it.
    num_good = 0
    while num_good < min(len(good), len(frames)) and good[num_good] == frames[num_good]:
        num_good += 1
    assert received == sent[:num_good]
    assert refused == (len(frames) > num_good)


@given(st.lists(FAULTS, min_size=1, max_size=3))
def test_edge_keys_over_a_bad_link_arrive_in_order_or_not_at_all(faults: list[Fault]) -> None:
    hop = Hop(IDENTITIES[0], 0)
    client = Client([hop])
    secrets = [(bytes(new_edge_secret()), bytes(new_edge_secret())) for _ in range(4)]
    good = [seal_edge_keys(client.channels[0], epoch, *pair) for epoch, pair in enumerate(secrets)]
    blobs = list(good)
    for fault in faults:
        fault.apply(blobs)
    received = []
    assert hop.channel is not None
    for blob in blobs:
        try:
            received.append(open_edge_keys(hop.channel, blob))
        except DecryptionFailed:
            break
    assert received == [(epoch, *pair) for epoch, pair in enumerate(secrets[: len(received)])]
    if blobs[: len(good)] == good:
        assert len(received) == len(good)
