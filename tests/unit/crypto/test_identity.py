"""A node's key file, its peer id and its signatures."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from planetserve.crypto.identity import (
    Identity,
    peer_id_bytes,
    peer_id_of,
    public_key_of,
    verify,
)
from planetserve.errors import ConfigError, LocalProtocolError, RemoteProtocolError

# From the libp2p specification's test vectors: an Ed25519 private key in libp2p's format.
SPEC_KEY_FILE = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)


def test_a_key_made_by_others_is_read(tmp_path: Path) -> None:
    path = tmp_path / "id"
    path.write_bytes(SPEC_KEY_FILE)
    path.chmod(0o600)
    identity = Identity.load_or_create(path)
    assert public_key_of(identity.peer_id).hex() == SPEC_KEY_FILE[-32:].hex()
    assert identity.peer_id == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def test_peer_id_is_an_identity_multihash_of_the_public_key() -> None:
    identity = Identity.generate()
    data = peer_id_bytes(identity.peer_id)
    assert identity.peer_id.startswith("12D3KooW")
    assert data[:6] == bytes.fromhex("002408011220")
    assert peer_id_of(data[6:]) == identity.peer_id


def test_file_is_created_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "id"
    first = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 68
    assert Identity.load_or_create(path).peer_id == first.peer_id
    assert [entry.name for entry in tmp_path.iterdir()] == ["id"]


def test_an_existing_key_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "id"
    path.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="--identity_path"):
        Identity.generate().save(path)
    assert path.read_bytes() == b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["id"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an identity file"),
        (b"hello", "not an identity file"),
        (bytes.fromhex("080012") + b"\xa9\x09" + bytes(1000), "RSA key.*another --identity_path"),
        (SPEC_KEY_FILE + b"\x00", "not an identity file"),
        (SPEC_KEY_FILE[:-1] + b"\x00", "damaged"),
    ],
)
def test_a_bad_file_says_what_to_do(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "id"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        Identity.load_or_create(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_an_unreadable_place_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        Identity.load_or_create(tmp_path / "missing" / "id")
    with pytest.raises(ConfigError, match="Is a directory"):
        Identity.load_or_create(tmp_path)


def test_a_key_others_can_read_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "id"
    Identity.generate().save(path)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Identity.load_or_create(path)
    assert f"chmod 600 {path}" in caplog.text


def test_signatures_hold_for_their_message_context_and_signer_only() -> None:
    alice, bob = Identity.generate(), Identity.generate()
    signature = alice.sign(b"record", b"message")
    assert len(signature) == 64
    assert verify(alice.peer_id, b"record", b"message", signature)
    assert not verify(alice.peer_id, b"record", b"messagf", signature)
    assert not verify(alice.peer_id, b"recor", b"dmessage", signature)
    assert not verify(bob.peer_id, b"record", b"message", signature)
    assert not verify(alice.peer_id, b"record", b"message", signature[:-1])
    assert not verify(alice.peer_id, b"record", b"message", b"")


@pytest.mark.parametrize(
    "peer_id",
    [
        "",
        "12D3KooW",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3p0",
        "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq1",
        "1" * 10_000,
        "é" * 52,
    ],
)
def test_a_bad_peer_id_is_refused(peer_id: str) -> None:
    with pytest.raises(RemoteProtocolError):
        public_key_of(peer_id)
    assert not verify(peer_id, b"record", b"message", bytes(64))


@pytest.mark.parametrize("context", [b"", bytes(256)])
def test_a_context_is_required(context: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        Identity.generate().sign(context, b"message")


def test_repr_does_not_show_the_key(tmp_path: Path) -> None:
    path = tmp_path / "id"
    identity = Identity.load_or_create(path)
    seed = path.read_bytes()[4:36]
    assert repr(identity) == f"Identity({identity.peer_id})"
    assert seed.hex() not in repr(vars(identity))
    assert os.fspath(path) not in repr(identity)
