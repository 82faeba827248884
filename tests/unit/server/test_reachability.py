"""A server finds out by itself that it announces an address at which nothing answers."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest

from planetserve.server.reachability import warn_if_unreachable


async def check(*addresses: str) -> None:
    await warn_if_unreachable(addresses)


async def test_only_addresses_that_do_not_answer_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with caplog.at_level(logging.WARNING):
            await check(f"/ip4/127.0.0.1/tcp/{port}", f"/dns4/localhost/tcp/{port}")
        assert not caplog.records
        await asyncio.sleep(0)
    with caplog.at_level(logging.WARNING):
        await check(f"/ip4/127.0.0.1/tcp/{port}")
    (record,) = caplog.records
    assert f"/ip4/127.0.0.1/tcp/{port}, which it announces" in record.getMessage()
    assert "--public_ip" in record.getMessage()
