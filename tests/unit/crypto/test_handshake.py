"""Handshakes and sealed_keys: fixed vectors, every part of the transcript, impostors, replays."""

from __future__ import annotations

from typing import Any

import pytest
import session_vectors as vectors
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from planetserve.crypto import handshake as handshake_module
from planetserve.crypto.handshake import PUBLIC_KEY_BYTES, ClientHandshake, answer_open
from planetserve.crypto.identity import Identity
from planetserve.crypto.secrets import (
    EDGE_KEYS_BYTES,
    SECRET_BYTES,
    ChannelSecret,
    new_edge_secret,
    open_edge_keys,
    seal_edge_keys,
    wipe,
)
from planetserve.errors import Blame, DecryptionFailed, HandshakeFailed, LocalProtocolError
from planetserve.wire.frame import Direction
from planetserve.wire.messages import OpenSession, to_text

HOP, OTHER = Identity.generate(), Identity.generate()
SESSION = bytes(range(16))
PAYLOAD = b"what OPEN says"
INBOUND, OUTBOUND = vectors.INBOUND, vectors.OUTBOUND

# RFC 7748, 6.1 names the check; these are u = 0, 1, p - 1, p, p + 1 and two points of order 8.
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]


def channels() -> tuple[ChannelSecret, ChannelSecret]:
    """A client's and a hop's end of one channel."""
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    answer, signature, hop = answer_open(HOP, SESSION, 0, PAYLOAD, client.offer)
    return client.finish(PAYLOAD, answer, signature), hop


def agree(client: ChannelSecret, hop: ChannelSecret) -> bool:
    return open_edge_keys(hop, seal_edge_keys(client, 0, INBOUND, OUTBOUND)) == (
        0,
        INBOUND,
        OUTBOUND,
    )


def test_capabilities_that_somebody_strips_from_open_end_the_handshake() -> None:
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    sent = OpenSession(
        model="m", fingerprint="f", dtype="float32", start=0, end=1, num_rows=1, max_length=1,
        edge=0, epoch=0, previous="client", next=None, first_step=0, offer=to_text(client.offer),
        capabilities=["receipts", "images"],
    )  # fmt: skip
    for left in ([], ["images"], ["images", "receipts"]):
        stripped = sent.model_copy(update={"capabilities": left}).encode()
        client = ClientHandshake(SESSION, 0, HOP.peer_id)
        answer, signature, _ = answer_open(HOP, SESSION, 0, stripped, client.offer)
        with pytest.raises(HandshakeFailed):
            client.finish(sent.encode(), answer, signature)


def test_the_vectors_are_what_the_plain_implementation_computes() -> None:
    assert vectors.compute() == vectors.EXPECTED
    # RFC 7748, 6.1 and RFC 8032, 7.1.
    assert vectors.EXPECTED["shared"].startswith("4a5d9d5ba4ce2de1728e3bf480350f25")
    public = Ed25519PrivateKey.from_private_bytes(vectors.HOP_IDENTITY).public_key()
    assert public.public_bytes_raw().hex().startswith("d75a980182b10ab7d54bfed3c964073a")


def test_the_handshake_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([vectors.CLIENT_PRIVATE, vectors.HOP_PRIVATE])

    class FixedKeys:
        @staticmethod
        def generate() -> X25519PrivateKey:
            return X25519PrivateKey.from_private_bytes(next(keys))

    monkeypatch.setattr(handshake_module, "X25519PrivateKey", FixedKeys)
    identity = Identity(Ed25519PrivateKey.from_private_bytes(vectors.HOP_IDENTITY))
    expected = {
        name: bytes.fromhex(value)
        for name, value in vectors.EXPECTED.items()
        if value[:4] != "12D3"
    }
    assert identity.peer_id == vectors.EXPECTED["peer id"]

    client = ClientHandshake(vectors.SESSION, vectors.EDGE, identity.peer_id)
    assert client.offer == expected["offer"]
    answer, signature, hop = answer_open(
        identity, vectors.SESSION, vectors.EDGE, vectors.OPEN_PAYLOAD, client.offer
    )
    assert (answer, signature) == (expected["answer"], expected["signature"])
    channel = client.finish(vectors.OPEN_PAYLOAD, answer, signature)

    sealed_keys = (
        seal_edge_keys(channel, 0, INBOUND, OUTBOUND),
        seal_edge_keys(channel, 1, OUTBOUND, INBOUND),
    )
    assert sealed_keys == (expected["edge keys of epoch 0"], expected["edge keys of epoch 1"])
    assert open_edge_keys(hop, sealed_keys[0]) == (0, INBOUND, OUTBOUND)
    assert open_edge_keys(hop, sealed_keys[1]) == (1, OUTBOUND, INBOUND)
    back = hop.seal(b"word", b"test")
    assert back == vectors.gcm_seal(expected["hop to client"], 0, b"word", b"test")


def test_both_sides_agree() -> None:
    client, hop = channels()
    assert agree(client, hop)


def test_every_handshake_has_keys_of_its_own() -> None:
    first, second = ClientHandshake(SESSION, 0, HOP.peer_id), channels()
    assert len(first.offer) == PUBLIC_KEY_BYTES
    assert first.offer != ClientHandshake(SESSION, 0, HOP.peer_id).offer
    with pytest.raises(DecryptionFailed):
        open_edge_keys(channels()[1], seal_edge_keys(second[0], 0, INBOUND, OUTBOUND))


@pytest.mark.parametrize(
    "seen",
    [
        {"session_id": bytes(16)},
        {"edge": 1},
        {"identity": OTHER},
        {"open_payload": PAYLOAD + b" "},
        {"open_payload": PAYLOAD[:-1]},
        {"open_payload": b""},
        {"offer": ClientHandshake(SESSION, 0, HOP.peer_id).offer},
    ],
)
def test_a_hop_that_saw_another_open_is_refused(seen: dict[str, Any]) -> None:
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    said = {
        "identity": HOP,
        "session_id": SESSION,
        "edge": 0,
        "open_payload": PAYLOAD,
        "offer": client.offer,
    }
    answer, signature, _ = answer_open(**{**said, **seen})
    with pytest.raises(HandshakeFailed) as caught:
        client.finish(PAYLOAD, answer, signature)
    assert caught.value.blame is Blame.REMOTE
    assert caught.value.peer_id == HOP.peer_id


def test_bytes_that_move_between_payload_and_keys_change_the_transcript() -> None:
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    shifted = client.offer[:1]
    answer, signature, _ = answer_open(HOP, SESSION, 0, PAYLOAD + shifted, client.offer)
    with pytest.raises(HandshakeFailed):
        client.finish(PAYLOAD, answer, signature)


@pytest.mark.parametrize(
    "peer_id", ["", "client", "12D3Koo", HOP.peer_id[:-1], "QmYyQSo1c1Ym7orWx"]
)
def test_a_name_that_is_no_peer_id_is_never_authenticated(peer_id: str) -> None:
    client = ClientHandshake(SESSION, 0, peer_id)
    answer, signature, _ = answer_open(HOP, SESSION, 0, PAYLOAD, client.offer)
    with pytest.raises(HandshakeFailed):
        client.finish(PAYLOAD, answer, signature)


def test_another_peers_signature_is_refused() -> None:
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    answer, _, _ = answer_open(HOP, SESSION, 0, PAYLOAD, client.offer)
    _, forged, _ = answer_open(OTHER, SESSION, 0, PAYLOAD, client.offer)
    with pytest.raises(HandshakeFailed):
        client.finish(PAYLOAD, answer, forged)


def test_a_signature_for_another_purpose_is_refused() -> None:
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    answer, _, _ = answer_open(HOP, SESSION, 0, PAYLOAD, client.offer)
    message = handshake_module._transcript(SESSION, 0, HOP.peer_id, PAYLOAD, client.offer, answer)
    assert handshake_module.verify(HOP.peer_id, b"x", message, HOP.sign(b"x", message))
    with pytest.raises(HandshakeFailed):
        client.finish(PAYLOAD, answer, HOP.sign(b"directory record", message))


def test_an_answer_to_an_earlier_open_is_refused() -> None:
    first = ClientHandshake(SESSION, 0, HOP.peer_id)
    answer, signature, _ = answer_open(HOP, SESSION, 0, PAYLOAD, first.offer)
    with pytest.raises(HandshakeFailed):
        ClientHandshake(SESSION, 0, HOP.peer_id).finish(PAYLOAD, answer, signature)


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_any_answer_that_the_hop_did_not_give_is_refused(answer: bytes, signature: bytes) -> None:
    with pytest.raises(HandshakeFailed):
        ClientHandshake(SESSION, 0, HOP.peer_id).finish(PAYLOAD, answer, signature)


@given(st.integers(0, PUBLIC_KEY_BYTES + 64 - 1), st.integers(1, 255))
def test_one_changed_byte_ends_the_handshake(at: int, change: int) -> None:
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    answer, signature, _ = answer_open(HOP, SESSION, 0, PAYLOAD, client.offer)
    sent = bytearray(answer + signature)
    sent[at] ^= change
    with pytest.raises(HandshakeFailed):
        client.finish(PAYLOAD, bytes(sent[:PUBLIC_KEY_BYTES]), bytes(sent[PUBLIC_KEY_BYTES:]))


@pytest.mark.parametrize("public", LOW_ORDER, ids=lambda key: key.hex()[:8])
def test_a_key_of_low_order_is_refused_by_both_sides(public: bytes) -> None:
    with pytest.raises(HandshakeFailed):
        answer_open(HOP, SESSION, 0, PAYLOAD, public)
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    transcript = handshake_module._transcript(
        SESSION, 0, HOP.peer_id, PAYLOAD, client.offer, public
    )
    signature = HOP.sign(handshake_module._SIGNATURE_CONTEXT, transcript)
    with pytest.raises(HandshakeFailed, match="is no key"):
        client.finish(PAYLOAD, public, signature)


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64])
def test_an_offer_of_another_length_is_refused_by_the_hop(size: int) -> None:
    with pytest.raises(HandshakeFailed):
        answer_open(HOP, SESSION, 0, PAYLOAD, b"\x09" * size)


@pytest.mark.parametrize("works", [True, False])
def test_a_handshake_serves_once(works: bool) -> None:
    client = ClientHandshake(SESSION, 0, HOP.peer_id)
    answer, signature, _ = answer_open(HOP, SESSION, 0, PAYLOAD, client.offer)
    if works:
        client.finish(PAYLOAD, answer, signature)
    else:
        with pytest.raises(HandshakeFailed):
            client.finish(PAYLOAD, answer, bytes(64))
    assert client._key is None
    with pytest.raises(LocalProtocolError, match="serves once"):
        client.finish(PAYLOAD, answer, signature)


@pytest.mark.parametrize(
    ("session_id", "edge"), [(b"short", 0), (bytes(17), 0), (SESSION, 65536), (SESSION, -1)]
)
def test_numbers_out_of_range_are_our_own_error(session_id: bytes, edge: int) -> None:
    client = ClientHandshake(session_id, edge, HOP.peer_id)
    with pytest.raises(LocalProtocolError):
        answer_open(HOP, session_id, edge, PAYLOAD, client.offer)
    with pytest.raises(LocalProtocolError):
        client.finish(PAYLOAD, client.offer, bytes(64))


def test_edge_keys_go_on_through_the_epochs() -> None:
    client, hop = channels()
    for epoch in (0, 1, 2, 7, 2**32 - 1):
        inbound, outbound = new_edge_secret(), new_edge_secret()
        blob = seal_edge_keys(client, epoch, inbound, outbound)
        assert len(blob) == EDGE_KEYS_BYTES
        assert open_edge_keys(hop, memoryview(bytearray(blob))) == (epoch, inbound, outbound)


def test_edge_keys_hide_their_secrets() -> None:
    client, _ = channels()
    blob = seal_edge_keys(client, 0, INBOUND, OUTBOUND)
    assert INBOUND[:8] not in blob
    assert OUTBOUND[:8] not in blob


@pytest.mark.parametrize("order", [(1,), (0, 0), (0, 2), (0, 1, 1), (0, 1, 0)])
def test_edge_keys_that_are_not_the_next_close_the_channel(order: tuple[int, ...]) -> None:
    client, hop = channels()
    blobs = [seal_edge_keys(client, epoch, INBOUND, OUTBOUND) for epoch in range(3)]
    for index in order[:-1]:
        open_edge_keys(hop, blobs[index])
    with pytest.raises(DecryptionFailed):
        open_edge_keys(hop, blobs[order[-1]])
    for blob in blobs:
        with pytest.raises(DecryptionFailed):
            open_edge_keys(hop, blob)


@pytest.mark.parametrize("at", range(EDGE_KEYS_BYTES))
def test_any_changed_byte_of_edge_keys_closes_the_channel(at: int) -> None:
    client, hop = channels()
    good = seal_edge_keys(client, 0, INBOUND, OUTBOUND)
    bad = bytearray(good)
    bad[at] ^= 1
    with pytest.raises(DecryptionFailed):
        open_edge_keys(hop, bad)
    with pytest.raises(DecryptionFailed):
        open_edge_keys(hop, good)
    with pytest.raises(LocalProtocolError):
        hop.seal(b"", b"")


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_edge_keys(blob: bytes) -> None:
    with pytest.raises(DecryptionFailed):
        open_edge_keys(channels()[1], blob)


def test_a_message_without_edge_keys_is_refused_even_from_the_client() -> None:
    client, hop = channels()
    with pytest.raises(DecryptionFailed):
        open_edge_keys(hop, client.seal(bytes(EDGE_KEYS_BYTES - 16), b"planetserve/1 receipt"))
    client, hop = channels()
    with pytest.raises(DecryptionFailed):
        open_edge_keys(hop, client.seal(b"short", b"planetserve/1 deal"))


def test_the_client_cannot_send_older_edge_keys_and_the_hop_would_not_take_it() -> None:
    client, hop = channels()
    open_edge_keys(hop, seal_edge_keys(client, 3, INBOUND, OUTBOUND))
    for epoch in (-1, 0, 3, 2**32):
        with pytest.raises(LocalProtocolError, match="cannot follow"):
            seal_edge_keys(client, epoch, INBOUND, OUTBOUND)
    client.keys_epoch = -1
    with pytest.raises(DecryptionFailed):
        open_edge_keys(hop, seal_edge_keys(client, 3, INBOUND, OUTBOUND))
    with pytest.raises(DecryptionFailed):
        open_edge_keys(hop, seal_edge_keys(client, 4, INBOUND, OUTBOUND))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_secrets_have_one_length(size: int) -> None:
    client, _ = channels()
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        seal_edge_keys(client, 0, bytes(size), OUTBOUND)
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        seal_edge_keys(client, 0, INBOUND, bytes(size))


def test_the_two_directions_of_a_channel_do_not_mix() -> None:
    client, hop = channels()
    assert hop.open(client.seal(b"down", b"c"), b"c") == b"down"
    assert client.open(hop.seal(b"up", b"c"), b"c") == b"up"
    with pytest.raises(DecryptionFailed):
        client.open(client.seal(b"reflected", b"c"), b"c")


def test_erased_channels_do_nothing_more() -> None:
    client, hop = channels()
    blob = seal_edge_keys(client, 0, INBOUND, OUTBOUND)
    for end in (client, hop):
        end.erase()
        end.erase()
        assert repr(end) == "ChannelSecret(erased)"
    with pytest.raises(LocalProtocolError, match="keys are gone"):
        seal_edge_keys(client, 1, INBOUND, OUTBOUND)
    with pytest.raises(DecryptionFailed):
        open_edge_keys(hop, blob)


def test_the_secret_of_a_channel_is_overwritten_as_soon_as_it_has_been_used() -> None:
    secret = new_edge_secret()
    kept = bytes(secret)
    channel = ChannelSecret(secret, Direction.FORWARD)
    assert secret == bytes(SECRET_BYTES)
    assert kept.hex() not in repr(channel)


def test_wiping_overwrites_in_place() -> None:
    secrets = [new_edge_secret(), new_edge_secret()]
    assert len(secrets[0]) == SECRET_BYTES
    assert secrets[0] != secrets[1]
    views = [memoryview(secret) for secret in secrets]
    wipe(*secrets)
    assert all(bytes(view) == bytes(SECRET_BYTES) for view in views)
