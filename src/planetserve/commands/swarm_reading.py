"""What a swarm says of its models, read once and without waiting for what is missing.

A server counts for a block if a client could use it: it is online, has the files that are asked
for, and speaks this node's protocol. A ping says whether it can be reached from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from planetserve.client.planning.compatibility import obstacle
from planetserve.clock import Clock, SystemClock
from planetserve.commands.options import SwarmOptions
from planetserve.errors import ConfigError, ModelError, PlanetServeError
from planetserve.model.checkpoint import Checkpoint
from planetserve.swarm import multiaddr
from planetserve.swarm.directory import Directory, ModelListing
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.swarm.network import Network
from planetserve.swarm.ping import ping
from planetserve.types import PeerId, ServerInfo, ServerState

_LISTED_NAME = re.compile(r"[\w.-]+-[0-9a-f]{12}")
"""As `Checkpoint.model_prefix` makes them."""
_MAX_AT_ONCE = 32
"""Servers or addresses that are asked at the same time."""
_MAX_PINGED = 512
_MAX_LISTED = 64
_DIAL_TIMEOUT_S = 2.0

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which model to look up.

    Attributes:
        name: as the user calls it.
        prefix: its name in the directory.
        fingerprint: of the user's files; None takes what most servers have.
        num_blocks: of the user's files; None takes what its servers say.
    """

    name: str
    prefix: str
    fingerprint: str | None = None
    num_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server as seen from here.

    Attributes:
        info: what it announces.
        trouble: why clients cannot use it; empty if they can.
        was_asked: whether it was pinged.
        rtt_ms: round-trip time; None if it did not answer, or was not asked.
        addresses: where it can be dialled, those that take connections from here first; empty
            unless asked for.
    """

    info: ServerInfo
    trouble: str = ""
    was_asked: bool = False
    rtt_ms: float | None = None
    addresses: tuple[tuple[str, bool], ...] = ()

    @property
    def answers(self) -> bool:
        """Whether it may be there: it answered, or was not asked."""
        return self.rtt_ms is not None or not self.was_asked

    @property
    def ms_per_token(self) -> float:
        """What a token of one user takes here now, without the way."""
        return len(self.info.span) * self.info.decode_ms_per_block + self.info.hop_overhead_ms

    @property
    def tokens_per_s(self) -> float:
        """What passes through all its blocks in large batches."""
        return self.info.tokens_per_s_per_block / len(self.info.span)


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model in a swarm."""

    name: str
    prefix: str
    fingerprint: str
    num_blocks: int
    servers: tuple[ServerStatus, ...]
    """In the order of their blocks; those that have left are not among them."""
    other_models: tuple[str, ...] = ()
    """Names of the other models that the directory lists."""

    @property
    def copies(self) -> list[int]:
        """For each block, how many servers clients can use it on."""
        return self._count(lambda server: not server.trouble and server.answers)

    @property
    def missing(self) -> list[Range]:
        """Blocks that no usable server announces."""
        announced = self._count(lambda server: not server.trouble)
        return ranges(block for block, number in enumerate(announced) if not number)

    @property
    def unanswered(self) -> list[Range]:
        """Blocks that are announced, but none of whose servers answers from here."""
        announced = self._count(lambda server: not server.trouble)
        return ranges(
            block
            for block, (number, there) in enumerate(zip(self.copies, announced, strict=True))
            if there and not number
        )

    @property
    def is_healthy(self) -> bool:
        return all(self.copies)

    def _count(self, counts: Callable[[ServerStatus], bool]) -> list[int]:
        steps = [0] * (self.num_blocks + 1)
        for server in filter(counts, self.servers):
            steps[server.info.span.start] += 1
            steps[server.info.span.end] -= 1
        return list(itertools.accumulate(steps[:-1]))


def ranges(blocks: Iterable[int]) -> list[Range]:
    """Half-open ranges of consecutive numbers, which come in order."""
    found: list[Range] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return found


class SwarmReader:
    """Reads the directory of a swarm that a node has joined."""

    def __init__(self, node: Network, clock: Clock, options: SwarmOptions):
        self.node = node
        self._directory = Directory(node, clock)
        self._options = options
        self._at_once = asyncio.Semaphore(_MAX_AT_ONCE)

    async def listings(self) -> dict[str, ModelListing]:
        """The models that the directory lists, by name; so many at most as a person would read.

        Raises:
            TransportError: the directory does not answer.
        """
        found = await self._directory.models()
        return {name: found[name] for name in sorted(found)[:_MAX_LISTED]}

    async def every_model(self) -> list[ModelStatus]:
        """All listed models, their servers not pinged.

        Raises:
            TransportError: the directory does not answer.
        """
        return [
            await self.model(Wanted(name, name), is_pinged=False) for name in await self.listings()
        ]

    async def model(
        self, wanted: Wanted, *, is_pinged: bool = True, with_addresses: bool = False
    ) -> ModelStatus:
        """One model and its servers.

        Raises:
            ConfigError: nobody says how many blocks it has.
            TransportError: the directory does not answer.
        """
        listed = await self.listings() if is_pinged else {}
        others = tuple(name for name in listed if name != wanted.prefix)
        known = [
            info
            for info in await self._directory.lookup(wanted.prefix)
            if info.state is not ServerState.OFFLINE
        ]
        if wanted.num_blocks is None and not known:
            raise ConfigError(
                f"no server of {wanted.name!r} in this swarm, which "
                + (f"serves {', '.join(others[:5])}" if others else "lists no model")
            )
        votes = Counter((info.fingerprint, info.num_blocks) for info in known)
        usual = votes.most_common(1)[0][0] if votes else ("", 0)
        fingerprint = usual[0] if wanted.fingerprint is None else wanted.fingerprint
        num_blocks = wanted.num_blocks or next(
            (number for (files, number), _ in votes.most_common() if files == fingerprint), usual[1]
        )
        known.sort(key=lambda info: (info.span, info.peer_id))
        seen = [ServerStatus(info, _trouble(info, fingerprint, num_blocks)) for info in known]
        # A stranger may announce a span outside this model.
        inside = [server for server in seen if server.info.span.end <= num_blocks]
        if is_pinged:
            inside = (
                await asyncio.gather(
                    *(self._look_at(one, with_addresses) for one in inside[:_MAX_PINGED])
                )
                + inside[_MAX_PINGED:]
            )
        return ModelStatus(
            wanted.name, wanted.prefix, fingerprint, num_blocks, tuple(inside), others
        )

    async def _look_at(self, server: ServerStatus, with_addresses: bool) -> ServerStatus:
        info, rtt_ms = server.info, None
        addresses: tuple[tuple[str, bool], ...] = ()
        async with self._at_once:
            with contextlib.suppress(PlanetServeError):
                rtt_ms = await ping(
                    self.node, info.peer_id, info.addresses, self._options.ping_timeout
                )
            if with_addresses:
                addresses = await _dialled(info.peer_id, info.addresses)
        return ServerStatus(info, server.trouble, True, rtt_ms, addresses)


@contextlib.asynccontextmanager
async def joined(options: SwarmOptions, clock: Clock | None = None) -> AsyncIterator[SwarmReader]:
    """A reader in the swarm of `options`, as a client, for the time of the block.

    Raises:
        ConfigError: an initial peer's address is malformed.
        PeerUnreachable: no initial peer answers.
    """
    clock = clock or SystemClock()
    config = NodeConfig(
        initial_peers=options.initial_peers,
        client_mode=True,
        daemon_startup_timeout_s=options.daemon_startup_timeout,
        connect_timeout_s=options.connect_timeout,
    )
    async with await SwarmNode.start(config, clock) as node:
        yield SwarmReader(node, clock, options)


def open_checkpoint(options: SwarmOptions) -> Checkpoint:
    """The files of the model of `options`.

    Raises:
        ModelError: there are none that can be read.
    """
    return Checkpoint.open(
        options.model or "",
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
    )


def is_listed_name(model: str) -> bool:
    """Whether this is how the directory names a model, and no folder."""
    return _LISTED_NAME.fullmatch(model) is not None and not Path(model).is_dir()


def find_wanted(options: SwarmOptions) -> Wanted | None:
    """The model of `options`: its files, or its name in the directory; None if none is named.

    Raises:
        ModelError: the model cannot be found.
    """
    if options.model is None:
        prefix = options.dht_prefix
        return None if prefix is None else Wanted(prefix, prefix)
    if is_listed_name(options.model):
        return Wanted(options.model, options.model)
    return wanted_of(open_checkpoint(options), options.model, options.dht_prefix)


def wanted_of(checkpoint: Checkpoint, name: str, dht_prefix: str | None) -> Wanted:
    """What to look up for these files, which the user calls `name`."""
    fingerprint = None
    with contextlib.suppress(ModelError):  # a folder may hold the configuration alone
        fingerprint = checkpoint.fingerprint
    prefix = dht_prefix or checkpoint.model_prefix
    return Wanted(name, prefix, fingerprint, checkpoint.num_blocks)


def _trouble(info: ServerInfo, fingerprint: str, num_blocks: int) -> str:
    """Why a client cannot use the server."""
    if info.state is not ServerState.ONLINE:
        return str(info.state.value)
    if (info.fingerprint, info.num_blocks) != (fingerprint, num_blocks):
        return f"other revision ({info.fingerprint[:12]})"
    return obstacle(info)


async def _dialled(peer_id: PeerId, texts: Sequence[str]) -> tuple[tuple[str, bool], ...]:
    """A server's addresses and whether each takes a connection, those that do first."""

    async def takes(address: multiaddr.Address) -> bool:
        try:
            async with asyncio.timeout(_DIAL_TIMEOUT_S):
                _, writer = await asyncio.open_connection(address.host, address.port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    parsed = []
    for text in texts[: multiaddr.MAX_DIALLED]:
        with contextlib.suppress(ConfigError):
            parsed.append(multiaddr.parse_peer(text))
    # A relay's address says where the relay is.
    own = [address for address in parsed if address.peer_id == peer_id and not address.relay_id]
    answers = await asyncio.gather(*map(takes, own))
    found = [(address.text, answer) for address, answer in zip(own, answers, strict=True)]
    return tuple(sorted(found, key=lambda one: not one[1]))
