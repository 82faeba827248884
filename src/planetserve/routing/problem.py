"""A snapshot and a request compiled into arrays: what every optimiser works on.

A chain is the same thing as one host per block, because neighbouring blocks on one server are one
hop. So a problem says which servers may host which block, and what staying and switching cost.
Servers that may run no block after the filters are not part of it; `n` below is the number of the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from planetserve.errors import MissingBlocksError, NoChainAvailable
from planetserve.routing.arrays import BoolArray, FloatArray, IntArray
from planetserve.routing.cost import hop_ms, latency_ms, throughput_tokens_per_s
from planetserve.routing.links import Links
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot, uncovered_spans
from planetserve.types import CLIENT, Chain, Hop


@dataclass(frozen=True, slots=True)
class RoutingProblem:
    """The servers that may run each block, and their costs. Every block has at least one legal
    host."""

    snapshot: SwarmSnapshot
    members: IntArray
    """`[n]` positions of the servers in `snapshot.servers`."""
    legal: BoolArray
    """`[num_blocks, n]`: whether the server may run the block."""
    decode_ms: FloatArray
    """`[n]` per block."""
    hop_ms: FloatArray
    """`[n]` overhead, waiting and sending time of one visit."""
    links: Links
    """Between servers."""
    client_half_ms: FloatArray
    """`[n]` between the client and each server."""
    block_rate: FloatArray
    """`[n]` tokens per second through one block."""
    hop_rate: FloatArray
    """`[n]` tokens per second the network carries when the server is visited once."""

    @classmethod
    def build(cls, snapshot: SwarmSnapshot, request: ChainRequest) -> RoutingProblem:
        """Apply the request's filters to the snapshot.

        Raises:
            MissingBlocksError: some blocks have no server that the request may use.
            NoChainAvailable: they have, but none with free cache for `request.tokens`.
        """
        legal = _legal_hosts(snapshot, request)
        missing = uncovered_spans(np.any(legal, axis=1))
        if missing:
            raise MissingBlocksError(_missing_message(snapshot, missing), missing)
        free = np.array([server.free_cache_tokens for server in snapshot.servers])
        legal &= free >= request.tokens
        full = uncovered_spans(np.any(legal, axis=1))
        if full:
            raise NoChainAvailable(
                f"no server of blocks {_spans_text(full)} has free cache for "
                f"{request.tokens} tokens; ask for fewer tokens or try again later"
            )
        return cls._compile(snapshot, legal)

    @classmethod
    def _compile(cls, snapshot: SwarmSnapshot, legal: BoolArray) -> RoutingProblem:
        members = np.flatnonzero(legal.any(axis=0))
        servers = [snapshot.servers[i] for i in members]
        network = np.array([s.network_bytes_per_s for s in servers])
        sent = snapshot.activation_bytes_per_token
        hop_rate = network / sent if sent > 0 else np.full(len(servers), np.inf)
        return cls(
            snapshot=snapshot,
            members=members,
            legal=legal[:, members],
            decode_ms=np.array([s.decode_ms_per_block for s in servers]),
            hop_ms=np.array([hop_ms(snapshot, s) for s in servers]),
            links=snapshot.round_trips.links(members),
            client_half_ms=snapshot.round_trips.half_from(snapshot.index[CLIENT])[members],
            block_rate=np.array([s.tokens_per_s_per_block for s in servers]),
            hop_rate=hop_rate,
        )

    @property
    def num_blocks(self) -> int:
        return len(self.legal)

    @property
    def num_servers(self) -> int:
        return len(self.members)

    def chain(self, hosts: Sequence[int]) -> Chain:
        """The chain that runs block `b` on server `hosts[b]`, priced by `routing.cost`."""
        hops: list[Hop] = []
        at = 0
        for host, run in groupby(hosts):
            end = at + len(list(run))
            hops.append(Hop(self.snapshot.servers[int(self.members[host])].id, at, end))
            at = end
        return self.price(Chain(tuple(hops)))

    def hosts(self, chain: Chain) -> tuple[int, ...]:
        """The server of every block of a chain on this problem."""
        ids = [self.snapshot.servers[i].id for i in self.members]
        column = {server_id: position for position, server_id in enumerate(ids)}
        return tuple(column[hop.peer_id] for hop in chain for _ in range(hop.start, hop.end))

    def price(self, chain: Chain) -> Chain:
        """`chain` with its predicted latency and throughput."""
        return Chain(
            chain.hops,
            latency_ms=latency_ms(self.snapshot, chain),
            throughput_tokens_per_s=throughput_tokens_per_s(self.snapshot, chain),
        )


def _legal_hosts(snapshot: SwarmSnapshot, request: ChainRequest) -> BoolArray:
    legal = np.zeros((snapshot.num_blocks, len(snapshot.servers)), dtype=bool)
    for column, server in enumerate(snapshot.servers):
        if request.allowed is not None and server.id not in request.allowed:
            continue
        if server.id in request.blocked or server.reputation < request.min_reputation:
            continue
        legal[server.start : server.end, column] = True
    for span, names in (request.trusted or {}).items():
        strangers = np.array([server.id not in names for server in snapshot.servers], dtype=bool)
        legal[span.start : span.end, strangers] = False
    return legal


def _missing_message(snapshot: SwarmSnapshot, missing: Sequence[tuple[int, int]]) -> str:
    text = _spans_text(missing)
    if snapshot.missing_blocks() == tuple(missing):
        return f"no server holds blocks {text}"
    return f"no server that this request may use holds blocks {text}"


def _spans_text(spans: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start}:{end}" for start, end in spans[:8])
    return shown if len(spans) <= 8 else f"{shown} and {len(spans) - 8} more spans"
