"""What `doctor` looks at in a swarm: its peers, its clock, the directory, and a model's servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from planetserve.client.planning.chain_planner import spans_text
from planetserve.client.planning.compatibility import obstacle
from planetserve.clock import Clock
from planetserve.commands.findings import Finding
from planetserve.commands.options import SwarmOptions
from planetserve.commands.swarm_reading import (
    ModelStatus,
    ServerStatus,
    SwarmReader,
    Wanted,
    joined,
)
from planetserve.errors import ConfigError, PlanetServeError
from planetserve.plan.report import short_name
from planetserve.swarm import multiaddr
from planetserve.types import ServerState

_SLOW_RTT_MS = 300.0
"""Round-trip time from which a link is called slow: with three hops, over half a second a token."""
_MAX_NAMED = 3


async def check_swarm(
    options: SwarmOptions, wanted: Wanted | None, clock: Clock | None = None
) -> AsyncIterator[Finding]:
    """Everything that can be seen of a swarm without a model's files."""
    try:
        reached = [finding async for finding in _peers(options)]
    except ConfigError as error:
        yield Finding("peers", "fault", str(error), "copy the address from who printed it")
        return
    for finding in reached:
        yield finding
    if not any(finding.verdict != "fault" for finding in reached):
        return
    try:
        async with joined(options, clock) as reader:
            yield _clock(reader)
            listed = await reader.listings()
            names = ", ".join(list(listed)[:5]) or "no model yet"
            yield Finding("directory", "ok", f"it answers, and lists {names}")
            if wanted is not None:
                for finding in check_model(await reader.model(wanted)):
                    yield finding
    except ConfigError as error:
        # A clock too far off, or a model that nobody serves.
        is_clock = "clock" in str(error)
        advice = "set this machine's clock: `timedatectl set-ntp true`" if is_clock else ""
        yield Finding("clock" if is_clock else "model", "fault", str(error), advice)
    except PlanetServeError as error:
        yield Finding(
            "directory", "fault", f"it does not answer: {error}",
            "the port is open, but nobody there speaks this protocol: check that a planetserve "
            "server or `planetserve dht` of this version listens there, and try again",
        )  # fmt: skip


def check_model(status: ModelStatus) -> Iterator[Finding]:
    """A model's blocks and servers."""
    if status.missing:
        start, end = status.missing[0]
        yield Finding(
            "blocks", "fault", f"{spans_text(status.missing)} of {status.name}: no usable server",
            f"start one: planetserve serve MODEL --block_indices {start}:{end} --initial_peers ...",
        )  # fmt: skip
    elif status.is_healthy:
        yield Finding("blocks", "ok", f"all {status.num_blocks} blocks of {status.name} are served")
    silent = [one for one in status.servers if not one.trouble and not one.answers]
    if silent:
        is_needed = bool(status.unanswered)
        blocks = f"; {spans_text(status.unanswered)} have no other" if is_needed else ""
        yield Finding(
            "servers", "fault" if is_needed else "warning",
            f"{_named(silent)}: announced, but no answer from here{blocks}",
            "their port is closed or they have gone: on their machine, check that they run, that "
            "--port is forwarded and --public_ip is right; the record of a dead one ends soon",
        )  # fmt: skip
    yield from _revisions(status)
    yield from _versions(status)
    yield from _links(status)


async def _peers(options: SwarmOptions) -> AsyncIterator[Finding]:
    """Whether the initial peers take connections."""
    addresses = [multiaddr.parse_peer(text) for text in options.initial_peers]
    reasons = await asyncio.gather(*(_dial(one, options.connect_timeout) for one in addresses))
    dead = [(one, why) for one, why in zip(addresses, reasons, strict=True) if why]
    if len(dead) < len(addresses):
        number = len(addresses) - len(dead)
        yield Finding("peers", "ok", f"{number} of {len(addresses)} addresses take connections")
    for address, why in dead[:_MAX_NAMED]:
        verdict = "fault" if len(dead) == len(addresses) else "warning"
        yield Finding(
            "peers", "fault" if verdict == "fault" else "warning",
            f"{address.host} port {address.port}: {why}",
            "that peer is gone or its port is closed: start it again, or give the address of "
            "another peer of the swarm",
        )  # fmt: skip


async def _dial(address: multiaddr.Address, timeout_s: float) -> str:
    """Why an address takes no connection; empty if it does."""
    if address.relay_id is not None:
        return ""  # that is where the relay is
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except TimeoutError:
        return f"no answer in {timeout_s:g} s"
    except OSError as error:
        return error.strerror or "no connection"
    writer.close()
    return ""


def _clock(reader: SwarmReader) -> Finding:
    offset_s = reader.node.clock.offset_s
    if not offset_s:
        return Finding("clock", "ok", "agrees with the initial peers'")
    way = "behind" if offset_s > 0 else "ahead of"
    return Finding(
        "clock", "fault", f"this machine's clock is {abs(offset_s):.0f} s {way} the initial peers'",
        "set it: `timedatectl set-ntp true` on most Linux systems",
    )  # fmt: skip


def _revisions(status: ModelStatus) -> Iterator[Finding]:
    """Servers of other files under the same name."""
    others = [
        one
        for one in status.servers
        if one.info.state is ServerState.ONLINE and one.info.fingerprint != status.fingerprint
    ]
    if not others:
        return
    theirs = sorted({one.info.fingerprint[:12] for one in others})
    yield Finding(
        "revision", "fault" if status.missing else "warning",
        f"{_named(others)} serve other files ({', '.join(theirs[:_MAX_NAMED])}) than "
        f"{status.fingerprint[:12]}",
        "load the same files, or give the --revision that the servers have",
    )  # fmt: skip


def _versions(status: ModelStatus) -> Iterator[Finding]:
    """Servers whose protocol this node does not speak."""
    others = [one for one in status.servers if obstacle(one.info)]
    if others:
        yield Finding(
            "protocol", "fault" if status.missing else "warning",
            f"{_named(others)}: {obstacle(others[0].info)}",
            "install the same version of planetserve here and there",
        )  # fmt: skip


def _links(status: ModelStatus) -> Iterator[Finding]:
    """Links that are slow from here."""
    known = [(one.rtt_ms, one) for one in status.servers if one.rtt_ms is not None]
    if not known:
        return
    longest_ms = max(rtt_ms for rtt_ms, _ in known)
    slow = [one for rtt_ms, one in known if rtt_ms >= _SLOW_RTT_MS]
    if not slow:
        yield Finding("links", "ok", f"servers answer within {longest_ms:.0f} ms")
        return
    yield Finding(
        "links", "warning",
        f"{_named(slow)}: an answer takes up to {longest_ms:.0f} ms",
        "use a cable or another network, or leave such servers out with --blocked_servers; every "
        "token that passes them waits that long",
    )  # fmt: skip


def _named(servers: list[ServerStatus]) -> str:
    names = [short_name(one.info.peer_id) for one in servers[:_MAX_NAMED]]
    more = f" and {len(servers) - _MAX_NAMED} more" if len(servers) > _MAX_NAMED else ""
    return ", ".join(names) + more
