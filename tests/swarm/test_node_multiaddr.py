"""The shapes of multiaddress that are understood, in text and in libp2p's binary form."""

from __future__ import annotations

import pytest
from hivemind.utils.multiaddr import Multiaddr
from hypothesis import given
from hypothesis import strategies as st

from planetserve.crypto.identity import Identity
from planetserve.errors import ConfigError
from planetserve.swarm import multiaddr

PEER = Identity.generate().peer_id
RELAY = Identity.generate().peer_id


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a multiaddress"),
        ("127.0.0.1:31337", "not a multiaddress"),
        ("/ip4/127.0.0.1", "only TCP"),
        ("/ip4/127.0.0.1/udp/31337/quic-v1", "only TCP"),
        ("/ip4/127.0.0.1/tcp/port", "not a TCP port"),
        ("/ip4/127.0.0.1/tcp/65536", "not a TCP port"),
        ("/ip4/127.0.0.256/tcp/1", "not a host"),
        ("/ip6/127.0.0.1/tcp/1", "not a host"),
        ("/ip6/fe80::1%eth0/tcp/1", "not a host"),
        ("/dns4/bad host/tcp/1", "not a host"),
        ("/dns4//tcp/1", "not a host"),
        ("/unix/tmp/tcp/1", "not a host"),
        ("/ip4/127.0.0.1/tcp/1/ws", "only /p2p/"),
        ("/ip4/127.0.0.1/tcp/1/p2p", "only /p2p/"),
        ("/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "Ed25519"),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}0", "base58"),
        ("/ip4/127.0.0.1/tcp/1" + "/p2p" * 100, "not a multiaddress"),
    ],
)
def test_other_shapes_are_refused_with_a_reason(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        multiaddr.parse(text)


def test_a_peer_address_says_where_and_who() -> None:
    address = multiaddr.parse_peer(f"/ip4/192.0.2.7/tcp/31337/p2p/{PEER}")
    assert (address.kind, address.host, address.port) == ("ip4", "192.0.2.7", 31337)
    assert (address.peer_id, address.relay_id) == (PEER, None)
    for text in ("/ip4/192.0.2.7/tcp/31337", f"/ip4/192.0.2.7/tcp/0/p2p/{PEER}"):
        with pytest.raises(ConfigError, match="where and who"):
            multiaddr.parse_peer(text)


@pytest.mark.parametrize(
    "place",
    [
        "/ip4/192.0.2.7/tcp/31337",
        "/ip6/2001:db8::7/tcp/1",
        "/dns4/example.org/tcp/443",
        "/dns6/example.org/tcp/443",
        f"/dns/{'a' * 60}.{'b' * 60}.{'c' * 10}.org/tcp/65535",
    ],
)
def test_the_binary_form_is_libp2ps(place: str) -> None:
    (binary,) = multiaddr.dialable(PEER, [f"{place}/p2p/{PEER}"])
    assert str(Multiaddr(binary)) == place


def test_a_relayed_address_names_the_relay() -> None:
    place = f"/ip4/192.0.2.7/tcp/31337/p2p/{RELAY}/p2p-circuit"
    (binary,) = multiaddr.dialable(PEER, [f"{place}/p2p/{PEER}"])
    assert str(Multiaddr(binary)) == place


def test_strangers_addresses_are_skipped_unless_they_lead_to_the_peer() -> None:
    good = f"/ip4/192.0.2.7/tcp/31337/p2p/{PEER}"
    others = ["", "/x", "/ip4/192.0.2.7/tcp/31337", f"/ip4/192.0.2.7/tcp/1/p2p/{RELAY}", "/" * 9999]
    assert len(multiaddr.dialable(PEER, [*others, good])) == 1
    assert len(multiaddr.dialable(PEER, [good] * 100)) == multiaddr.MAX_DIALLED


@given(st.text(max_size=80))
def test_no_text_surprises_the_parser(text: str) -> None:
    for candidate in (
        text,
        f"/ip4/{text}/tcp/1",
        f"/dns/x/tcp/{text}",
        f"/ip4/1.2.3.4/tcp/1/{text}",
    ):
        try:
            multiaddr.parse(candidate)
        except ConfigError:
            continue
    assert isinstance(multiaddr.dialable(PEER, [text]), list)


LOOPBACK = ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1", "/ip4/0.0.0.0/tcp/1", "/ip6/::/tcp/1",
            "/ip6/::ffff:127.0.0.1/tcp/1")  # fmt: skip
LINK_LOCAL = ("/ip4/169.254.169.254/tcp/80", "/ip6/fe80::1/tcp/1")
PRIVATE = ("/ip4/10.0.0.5/tcp/1", "/ip4/192.168.1.5/tcp/1", "/ip4/100.64.0.1/tcp/1",
           "/ip6/fd00::1/tcp/1", "/ip6/::ffff:10.0.0.5/tcp/1", "/ip6/64:ff9b::a00:5/tcp/1",
           "/ip6/2002:a00:5::/tcp/1", "/ip4/240.0.0.1/tcp/1", "/ip4/224.0.0.1/tcp/1")  # fmt: skip
PUBLIC = ("/ip4/8.8.8.8/tcp/1", "/ip6/2606:4700::1111/tcp/1")
NAMED = ("/dns4/example.org/tcp/1", "/dns/localhost/tcp/1")


@pytest.mark.parametrize(
    ("own", "kinds"),
    [
        ((PUBLIC[0],), (PUBLIC,)),
        ((PUBLIC[0], "/ip4/127.0.0.1/tcp/9"), (PUBLIC,)),
        ((PUBLIC[1], PRIVATE[1]), (PUBLIC, PRIVATE)),
        ((PUBLIC[0], NAMED[0]), (PUBLIC, NAMED)),
        (("/ip4/192.168.1.9/tcp/9", "/ip4/127.0.0.1/tcp/9"), (PUBLIC, PRIVATE, LOOPBACK, NAMED)),
        (("/ip4/127.0.0.1/tcp/9",), (PUBLIC, LOOPBACK, NAMED)),
        ((LINK_LOCAL[0],), (PUBLIC, LINK_LOCAL, NAMED)),
    ],
)
def test_strangers_make_a_node_dial_only_places_like_its_own(
    own: tuple[str, ...], kinds: tuple[tuple[str, ...], ...]
) -> None:
    everywhere = (*LOOPBACK, *LINK_LOCAL, *PRIVATE, *PUBLIC, *NAMED, "nonsense")
    allowed = {address for kind in kinds for address in kind}
    assert set(multiaddr.permitted(own, everywhere)) == allowed
