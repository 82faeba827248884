"""The cost of a chain, exactly as in the planner's problem, and the definition of a chain.

One token travels client -> first hop -> ... -> last hop -> client, so every link is paid at half
its round-trip time:

    latency_ms = rtt(client, s1)/2 + sum rtt(sk, sk+1)/2 + rtt(sn, client)/2
                 + hops * hop_overhead_ms + sum blocks * decode_ms_per_block + sum over hops wait_ms
                 + sum over hops 1000 * activation_bytes / network_bytes_per_s

and the throughput of a chain is that of its slowest stage, compute or link, where a server that is
visited twice divides its capacity between its visits:

    throughput = min over servers of min(tokens_per_s_per_block / blocks it runs in the whole chain,
                                         network_bytes_per_s / (activation_bytes * its hops))
"""

from __future__ import annotations

import math
from collections import Counter

from planetserve.errors import ConfigError
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.types import CLIENT, Chain


def check_chain(snapshot: SwarmSnapshot, chain: Chain) -> None:
    """Check that hops tile `[0, num_blocks)` in order, each inside its server's span.

    Raises:
        ConfigError: they do not; the message names the first hop at fault.
    """
    at, previous = 0, ""
    for number, hop in enumerate(chain, start=1):
        server = snapshot.server(hop.peer_id)
        if hop.start != at or hop.end <= hop.start:
            raise ConfigError(f"hop {number} is {hop.start}:{hop.end}; it must start at {at}")
        if hop.start < server.start or hop.end > server.end:
            raise ConfigError(
                f"hop {number} is {hop.start}:{hop.end}, outside {server.start}:{server.end}, "
                f"the span of server {hop.peer_id!r}"
            )
        if hop.peer_id == previous:
            raise ConfigError(
                f"hops {number - 1} and {number} are on one server: make them one hop"
            )
        at, previous = hop.end, hop.peer_id
    if at != snapshot.num_blocks:
        raise ConfigError(f"the chain ends at block {at} of {snapshot.num_blocks}")


def latency_ms(snapshot: SwarmSnapshot, chain: Chain) -> float:
    """Predicted time of one token around the ring of `chain`, in milliseconds."""
    ring = [CLIENT, *(hop.peer_id for hop in chain), CLIENT]
    terms = [snapshot.rtt(a, b) / 2 for a, b in zip(ring, ring[1:], strict=False)]
    for hop in chain:
        server = snapshot.server(hop.peer_id)
        terms.append((hop.end - hop.start) * server.decode_ms_per_block)
        terms.append(hop_ms(snapshot, server))
    return math.fsum(terms)


def hop_ms(snapshot: SwarmSnapshot, server: ServerPoint) -> float:
    """Time in milliseconds of a visit to `server` besides links and blocks: overhead, waiting,
    sending."""
    sending = 1000.0 * snapshot.activation_bytes_per_token / server.network_bytes_per_s
    return snapshot.hop_overhead_ms + server.wait_ms + sending


def throughput_tokens_per_s(snapshot: SwarmSnapshot, chain: Chain) -> float:
    """Tokens per second through `chain` when it is kept full: its slowest stage."""
    blocks: Counter[str] = Counter()
    hops: Counter[str] = Counter()
    for hop in chain:
        blocks[hop.peer_id] += hop.end - hop.start
        hops[hop.peer_id] += 1
    slowest = math.inf
    for server_id, num_blocks in blocks.items():
        server = snapshot.server(server_id)
        slowest = min(slowest, server.tokens_per_s_per_block / num_blocks)
        sent = snapshot.activation_bytes_per_token * hops[server_id]
        if sent > 0:
            slowest = min(slowest, server.network_bytes_per_s / sent)
    return slowest


def reputation(snapshot: SwarmSnapshot, chain: Chain) -> float:
    """Product of the reputations of the servers used, each counted once and as at most 1."""
    used = {hop.peer_id for hop in chain}
    return math.prod(min(1.0, snapshot.server(name).reputation) for name in sorted(used))


def price(snapshot: SwarmSnapshot, chain: Chain) -> float:
    """Price of one token through all blocks."""
    return math.fsum((hop.end - hop.start) * snapshot.server(hop.peer_id).price for hop in chain)
