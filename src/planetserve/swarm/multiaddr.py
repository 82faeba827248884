"""The few shapes of libp2p multiaddress this project uses, checked before anybody dials them.

Only TCP is spoken: `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`, then `/p2p/PEER_ID` where a peer is
meant, and `/p2p-circuit/p2p/PEER_ID` behind a relay. Addresses come from flags, where a mistake
deserves a clear message, and from strangers' records, where it only deserves to be skipped. Pure.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from planetserve.crypto.identity import peer_id_bytes
from planetserve.errors import ConfigError, RemoteProtocolError
from planetserve.types import PeerId

MAX_ADDRESS_CHARS = 256
MAX_DIALLED = 8
"""Addresses of one peer that are tried; the rest are ignored."""

_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?$")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PUBLIC, _PRIVATE, _LINK_LOCAL, _LOOPBACK, _NAMED = (
    "public", "private", "link-local", "loopback", "named",
)  # fmt: skip
_P2P_CODE = bytes.fromhex("a503")


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed multiaddress."""

    text: str
    kind: str
    host: str
    port: int
    peer_id: PeerId | None
    relay_id: PeerId | None


def parse(text: str) -> Address:
    """Read one multiaddress.

    Raises:
        ConfigError: it is none of the shapes above; the message says what is wrong.
    """
    if len(text) > MAX_ADDRESS_CHARS or not text.startswith("/"):
        raise ConfigError(
            f"{text[:80]!r} is not a multiaddress; it looks like /ip4/192.0.2.7/tcp/31337"
        )
    parts = text.rstrip("/").split("/")[1:]
    if len(parts) < 4 or parts[2] != "tcp":
        raise ConfigError(
            f"multiaddress {text!r} is not /ip4/HOST/tcp/PORT; only TCP is spoken (no QUIC or UDP)"
        )
    kind, host, _, port_text, *rest = parts
    _check_host(kind, host, text)
    if not port_text.isdecimal() or int(port_text) > 65535:
        raise ConfigError(f"multiaddress {text!r}: {port_text!r} is not a TCP port")
    relay_id: PeerId | None = None
    peer_id: PeerId | None = None
    match rest:
        case []:
            pass
        case ["p2p", peer_id]:
            pass
        case ["p2p", relay_id, "p2p-circuit", "p2p", peer_id]:
            pass
        case _:
            raise ConfigError(f"multiaddress {text!r}: only /p2p/PEER_ID may follow the port")
    for name in (peer_id, relay_id):
        if name is not None:
            _check_peer_id(name, text)
    return Address(text, kind, host, int(port_text), peer_id, relay_id)


def parse_peer(text: str) -> Address:
    """Read a multiaddress that says which peer it leads to.

    Raises:
        ConfigError: it is malformed or does not end in /p2p/PEER_ID.
    """
    address = parse(text)
    if address.peer_id is None or address.port == 0:
        raise ConfigError(
            f"address {text!r} must say where and who: /ip4/192.0.2.7/tcp/31337/p2p/12D3KooW..."
        )
    return address


def dialable(peer_id: PeerId, addresses: Iterable[str]) -> list[bytes]:
    """Binary addresses to dial `peer_id` at; strangers' malformed or foreign ones are left out."""
    found: list[bytes] = []
    for text in addresses:
        try:
            address = parse_peer(text)
        except ConfigError:
            continue
        if address.peer_id == peer_id and len(found) < MAX_DIALLED:
            found.append(_binary(address))
    return found


def permitted(own: Iterable[str], addresses: Iterable[str]) -> list[str]:
    """Those of a stranger's addresses that a node with the addresses `own` may be made to dial.

    Public ones always. Private and link-local ones if the node has one of the same kind; loopback
    ones if, besides, it has no public one; names if it has a name, or no public address.
    """
    places = {_place(address) for address in _parsed(own)}
    is_public = _PUBLIC in places
    allowed = {_PUBLIC} | places
    if is_public:
        allowed.discard(_LOOPBACK)
    else:
        allowed.add(_NAMED)
    return [address.text for address in _parsed(addresses) if _place(address) in allowed]


def _parsed(addresses: Iterable[str]) -> Iterator[Address]:
    for text in addresses:
        with contextlib.suppress(ConfigError):
            yield parse(text)


def _place(address: Address) -> str:
    """From where an address can be reached."""
    if address.kind not in ("ip4", "ip6"):
        return _NAMED
    ip = ipaddress.ip_address(address.host)
    if isinstance(ip, ipaddress.IPv6Address):
        ip = _embedded(ip) or ip
    if ip.is_loopback or ip.is_unspecified:
        return _LOOPBACK
    if ip.is_link_local:
        return _LINK_LOCAL
    return _PUBLIC if ip.is_global and not ip.is_multicast else _PRIVATE


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that some IPv6 addresses stand for."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


def _binary(address: Address) -> bytes:
    host: bytes
    if address.kind == "ip4":
        host = b"\x04" + ipaddress.IPv4Address(address.host).packed
    elif address.kind == "ip6":
        host = b"\x29" + ipaddress.IPv6Address(address.host).packed
    else:
        code = {"dns": 0x35, "dns4": 0x36, "dns6": 0x37}[address.kind]
        name = address.host.encode()
        # Host names have at most 253 bytes; a varint needs a second byte from 128 on.
        length = bytes([len(name)]) if len(name) < 128 else bytes([len(name) & 127 | 128, 1])
        host = bytes([code]) + length + name
    binary = host + b"\x06" + address.port.to_bytes(2, "big")
    if address.relay_id is not None:
        relay = peer_id_bytes(address.relay_id)
        binary += _P2P_CODE + bytes([len(relay)]) + relay + bytes.fromhex("a202")
    return binary


def _check_host(kind: str, host: str, text: str) -> None:
    try:
        if kind == "ip4":
            ipaddress.IPv4Address(host)
        elif kind == "ip6":
            # A scope ("%eth0") means nothing to other machines.
            if "%" in host:
                raise ValueError("scoped")
            ipaddress.IPv6Address(host)
        elif kind not in ("dns", "dns4", "dns6") or not _HOST_NAME.match(host):
            raise ValueError("host")
    except ValueError:
        raise ConfigError(f"multiaddress {text!r}: /{kind}/{host} is not a host") from None


def _check_peer_id(name: str, text: str) -> None:
    try:
        peer_id_bytes(name)
    except RemoteProtocolError as error:
        raise ConfigError(f"multiaddress {text!r}: {error}") from None
