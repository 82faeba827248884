"""The link in front of one server, which tests spoil: for everybody, or for one who dialled.

It is below libp2p's encryption: a held link loses nothing, and a flipped bit ends the connection,
because libp2p notices. Faults inside the frames of a session are made elsewhere (`tampering.py`).

Who dialled is known by process, so that one link of many can be cut. A `FaultyLink` lives on the
event loop on which it was started; methods that spoil may be called from any thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from planetserve.testing.proxy import Link, LinkProxy, TcpAddress, Way

IN, OUT = frozenset({Way.IN}), frozenset({Way.OUT})
BOTH = IN | OUT
FAIR = Link()


class FaultyLink:
    """The way to the peer that listens on `port` of 127.0.0.1.

    Args:
        process_of: id of the process that has this local TCP port.
    """

    def __init__(self, port: int, process_of: Callable[[int], int | None]):
        self.port = port
        self._process_of = process_of
        self._diallers: dict[TcpAddress, int | None] = {}
        self._links: dict[int | None, Link] = {}
        self._loop: asyncio.AbstractEventLoop
        self._proxy: LinkProxy

    async def start(self) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        self._proxy = await LinkProxy.start(("127.0.0.1", self.port), self._link_of)

    @property
    def address(self) -> str:
        """Multiaddress to announce."""
        return f"/ip4/127.0.0.1/tcp/{self._proxy.address[1]}"

    def set(self, link: Link, dialler: int | None = None) -> None:
        """Have this link for the connections of a process (None: of all without their own)."""
        self._links[dialler] = link
        self._loop.call_soon_threadsafe(self._proxy.look_again)

    def clear(self) -> None:
        """A fair link for all, to the right server."""
        self._links.clear()
        self._diallers.clear()
        self.lead_to(self.port)
        self._loop.call_soon_threadsafe(self._proxy.look_again)

    def lead_to(self, port: int) -> None:
        """Lead new connections elsewhere."""
        self._proxy.target = ("127.0.0.1", port)

    async def reset(self, dialler: int | None = None) -> None:
        """Break the connections of a process (None: all); new ones can be made."""
        await self._proxy.cut(lambda address: dialler in (None, self._dialler(address)))

    async def close(self) -> None:
        """Drop every connection and listen no more."""
        await self._proxy.close()

    def _link_of(self, address: TcpAddress) -> Link:
        everybody = self._links.get(None, FAIR)
        if len(self._links) == (None in self._links):
            return everybody
        return self._links.get(self._dialler(address), everybody)

    def _dialler(self, address: TcpAddress) -> int | None:
        if address not in self._diallers:
            self._diallers[address] = self._process_of(address[1])
        return self._diallers[address]


def turned(link: Link) -> Link:
    """The same link, seen from its other end."""
    other = {Way.IN: Way.OUT, Way.OUT: Way.IN}
    return Link(
        link.delay_s, link.bytes_per_s, frozenset(other[way] for way in link.holds),
        frozenset(other[way] for way in link.corrupts),
    )  # fmt: skip
