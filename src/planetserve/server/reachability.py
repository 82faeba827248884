"""Whether anything answers where this server tells others to dial it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence

from planetserve.swarm import multiaddr

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0


async def warn_if_unreachable(announced: Sequence[str]) -> None:
    """Dial the addresses that were given to be announced, and say which do not answer.

    A hint only: not every router lets a machine behind it reach its own public address.
    """
    for text in announced:
        address = multiaddr.parse(text)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                _, writer = await asyncio.open_connection(address.host, address.port)
        except (OSError, TimeoutError) as error:
            reason = os.strerror(error.errno) if error.errno else "no answer"
            logger.warning(
                "this server cannot be reached from here at %s, which it announces (%s); if "
                "clients cannot reach it either, check --public_ip or --announce_maddrs and that "
                "the port is forwarded to this machine", text, reason,
            )  # fmt: skip
        else:
            writer.close()
