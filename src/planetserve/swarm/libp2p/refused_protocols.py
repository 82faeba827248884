"""libp2p protocols that the daemon would serve on its own, refused here.

The daemon carries strangers' connections (circuit relay, as version 2's hop) whatever its flags
say, and answers pings without counting them. Nothing of this project needs either, so this process
takes the protocols over, as it does those of the directory, and closes their streams unheard. A
node that is to relay (`NodeConfig.use_relay`) leaves the daemon its relay protocols.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

from planetserve.swarm.libp2p.daemon import Daemon
from planetserve.types import PeerId

RELAY_PROTOCOLS = (
    "/libp2p/circuit/relay/0.2.0/hop",
    "/libp2p/circuit/relay/0.2.0/stop",
    "/libp2p/circuit/relay/0.1.0",
)
OTHER_PROTOCOLS = (
    "/ipfs/ping/1.0.0",
    "/libp2p/autonat/1.0.0",
    "/libp2p/dcutr",
)


async def refuse(daemon: Daemon, *, use_relay: bool, refused: Counter[str]) -> None:
    """Close every stream of these protocols, and count them as `refused["libp2p"]`.

    Raises:
        TransportError: the daemon does not answer.
    """

    def accept(_remote: PeerId, sock: socket.socket, _head: bytes) -> None:
        refused["libp2p"] += 1
        sock.close()

    # A node that uses relays asks for its address (AutoNAT) and leaves them (DCUtR) as it may.
    names = () if use_relay else (*RELAY_PROTOCOLS, *OTHER_PROTOCOLS)
    await asyncio.gather(*(daemon.add_protocol(name, accept) for name in names))
