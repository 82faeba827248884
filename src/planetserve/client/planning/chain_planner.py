"""From what servers announce and a client's settings to a chain over the blocks left to the swarm.

Optimizers count blocks from 0, so the blocks that the client runs itself are cut off before a plan
and the numbers put right after it. Records are signed but say what their owners like: one that
cannot be true of this model, or that no plan could use, is left out here, so that only the server
that made it loses by it. Decisions only: no clock, no network.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from planetserve.client.planning.block_ranges import split_blocks, trusted_spans
from planetserve.client.ring.ring_spec import Gap
from planetserve.config import ClientConfig
from planetserve.errors import (
    MissingBlocksError,
    NoChainAvailable,
    SessionLengthError,
)
from planetserve.model.checkpoint import Checkpoint
from planetserve.routing.cost import latency_ms
from planetserve.routing.migration import move_ms, new_hops
from planetserve.routing.optimizers import OPTIMIZERS, ChainOptimizer
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.server_points import usable_point
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.swarm.ewma import PeerEwma
from planetserve.tensors import dtype_name
from planetserve.types import CLIENT, BlockSpan, Chain, PeerId, ServerInfo

logger = logging.getLogger(__name__)

_DEFAULT_RTT_MS = 50.0
_AVOIDED_MS = 5_000.0
"""Milliseconds charged for a pair of neighbours to avoid, and for each visit to a server of such a
pair, once per pair: more than any other chain costs."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a client knows of its model without asking anybody."""

    name: str
    prefix: str
    fingerprint: str
    num_blocks: int
    hidden_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> ModelFacts:
        """The facts of a checkpoint whose activations travel as `dtype`."""
        return cls(
            name=checkpoint.name,
            prefix=checkpoint.model_prefix,
            fingerprint=checkpoint.fingerprint,
            num_blocks=checkpoint.num_blocks,
            hidden_size=checkpoint.hidden_size,
            dtype=dtype,
        )


class ChainPlanner:
    """Plans chains for one client.

    Raises:
        ConfigError: `local_blocks`, `trusted_blocks` or `chain_optimizer` is wrong.
    """

    def __init__(
        self,
        config: ClientConfig,
        facts: ModelFacts,
        rtt: PeerEwma,
        rng: random.Random | None = None,
    ):
        self.remote = split_blocks(config, facts.num_blocks).remote
        """The blocks that the swarm runs."""
        self.trusted = {
            inside: names
            for span, names in trusted_spans(config, facts.num_blocks).items()
            if (inside := _overlap(span, self.remote)) is not None
        }
        """Remote blocks that only some servers may run, by their true numbers."""
        self._config = config
        self._make_optimizer(0)  # a mistyped name should fail here
        self._facts = facts
        self._rtt = rtt
        self._rng = rng or random.SystemRandom()
        self._warned_dtype = False
        self.avoided_edges: Mapping[tuple[PeerId, PeerId], float] = {}
        """Pairs of servers that had trouble with each other, and how much speaks against each."""

    def plan(
        self,
        servers: Sequence[ServerInfo],
        num_rows: int,
        lease_tokens: int,
        seed: int | None = None,
        gap: Gap | None = None,
    ) -> Chain:
        """The chain that the optimizer picks among `servers` for a session of this size.

        Args:
            servers: those that may be used.
            num_rows: sequences in the session's batch.
            lease_tokens: tokens of each that every hop must have room for.
            seed: decides among chains that are nearly equal, so that sessions spread over them;
                below 2^32, fresh if None.
            gap: plan only the hops that fill it.

        Raises:
            MissingBlocksError: some blocks are held by none of them that may run them.
            NoChainAvailable: they lack free cache.
            SessionLengthError: none of them takes sequences this long.
        """
        chosen = self.candidates(servers, num_rows, lease_tokens, gap)
        wanted = dtype_name(self._facts.dtype)
        chain = self._optimize(
            self.snapshot(chosen, num_rows, gap), num_rows * lease_tokens, seed, gap
        )
        if not self._warned_dtype and len(chosen) > len(self._alike(chosen)):
            self._warned_dtype = True
            logger.warning(
                "no chain of %s servers covers the model; using servers of another dtype or with "
                "quantised weights, so outputs may differ from local %s ones",
                wanted,
                wanted,
            )
        return chain

    def candidates(
        self,
        servers: Sequence[ServerInfo],
        num_rows: int,
        lease_tokens: int,
        gap: Gap | None = None,
    ) -> Sequence[ServerInfo]:
        """Those of `servers` that a session of this size is planned on; arguments as for `plan`.

        Servers that compute in this client's dtype with weights as they are, if these have a chain;
        else all that take sequences this long.

        Raises:
            SessionLengthError: none of them takes sequences this long.
        """
        long_enough = [info for info in servers if info.max_session_tokens >= lease_tokens]
        if len(long_enough) < len(servers):
            self._require_length(servers, long_enough, lease_tokens)
        alike = self._alike(long_enough)
        if len(alike) < len(long_enough):
            request = self._request(num_rows * lease_tokens, gap)
            try:
                RoutingProblem.build(self.snapshot(alike, num_rows, gap), request)
            except NoChainAvailable:
                return long_enough
        return alike

    def longest(self, servers: Sequence[ServerInfo], num_rows: int, least: int) -> int | None:
        """Tokens per row for which a chain of `servers` has room now.

        When their free cache is too small for `least`, that or the most they take with an empty
        one: what is missing may be free again soon. None if they have no chain at all.
        """
        allowed, room = np.zeros((2, len(self.remote)), dtype=np.int64)
        for info in servers:
            inside = _overlap(info.span, self.remote)
            if inside is None:
                continue
            blocks = np.zeros(len(self.remote), dtype=bool)
            blocks[inside.start - self.remote.start : inside.end - self.remote.start] = True
            for span, names in self.trusted.items():
                if info.peer_id not in names:
                    blocks[span.start - self.remote.start : span.end - self.remote.start] = False
            longest = info.max_session_tokens
            allowed[blocks] = np.maximum(allowed[blocks], longest)
            room[blocks] = np.maximum(
                room[blocks], min(longest, info.free_cache_tokens // num_rows)
            )
        if not len(allowed) or not allowed.min():
            return None
        return int(max(room.min(), min(least, allowed.min())))

    def _alike(self, servers: Iterable[ServerInfo]) -> list[ServerInfo]:
        wanted = dtype_name(self._facts.dtype), "none"
        return [info for info in servers if (info.dtype, info.quant_type) == wanted]

    def snapshot(
        self, servers: Sequence[ServerInfo], num_rows: int, gap: Gap | None = None
    ) -> SwarmSnapshot:
        """What the optimizer plans on. Its block 0 is the first one that the swarm runs.

        With `gap`, its block 0 is the first of the gap, and the place of the client is taken by
        the hops on both sides of it.
        """
        blocks = self.remote if gap is None else gap.span
        points = [point for info in servers if (point := self._point(info, blocks)) is not None]
        known = {point.id for point in points}
        usable = [info for info in servers if info.peer_id in known]
        links = self._links(usable)
        if gap is not None:
            links[CLIENT] = self._links_into(gap, self._links(servers), known)
        return SwarmSnapshot(
            num_blocks=len(blocks),
            activation_bytes_per_token=(
                self._facts.hidden_size * self._facts.dtype.itemsize * num_rows
            ),
            hop_overhead_ms=_hop_overhead_ms(usable),
            default_rtt_ms=_DEFAULT_RTT_MS,
            servers=tuple(points),
            rtt_ms=links,
        )

    def latency_ms(
        self, servers: Sequence[ServerInfo], num_rows: int, chain: Chain
    ) -> float | None:
        """Predicted time per token of a chain; None if `servers` lacks one of its hops.

        With what is charged for suspects.
        """
        snapshot = self.snapshot(servers, num_rows)
        if not all(hop.peer_id in snapshot.index for hop in chain):
            return None
        return latency_ms(snapshot, self._shifted(chain, -self.remote.start))

    def move_ms(
        self, servers: Sequence[ServerInfo], num_rows: int, position: int, old: Chain, new: Chain
    ) -> float:
        """Time it takes to bring a session of `position` tokens per row from one chain to another,
        of which `servers` knows all hops."""
        first, last = new_hops(old.hops, new.hops)
        shifted = self._shifted(new, -self.remote.start).hops
        entering = shifted[first : len(shifted) - last]
        return move_ms(self.snapshot(servers, num_rows), entering, position, num_rows)

    def is_suspect(self, chain: Chain) -> bool:
        """Whether more than time is charged for a hop of the chain."""
        suspects = {peer for edge in self.avoided_edges for peer in edge}
        return any(hop.peer_id in suspects for hop in chain)

    def _shifted(self, chain: Chain, offset: int) -> Chain:
        """The chain with its blocks numbered otherwise."""
        hops = tuple(
            dataclasses.replace(hop, start=hop.start + offset, end=hop.end + offset)
            for hop in chain
        )
        return dataclasses.replace(chain, hops=hops)

    def barred(
        self, missing: Sequence[tuple[int, int]], servers: Iterable[ServerInfo]
    ) -> list[ServerInfo]:
        """Those of `servers` that hold some of the missing blocks but may not run them."""
        return [
            info
            for info in servers
            if any(
                info.peer_id not in names and start < info.span.end and info.span.start < end
                for span, names in self.trusted.items()
                for start, end in _clipped(missing, span)
            )
        ]

    def _point(self, info: ServerInfo, blocks: BlockSpan) -> ServerPoint | None:
        """The planner's view of a server, its span cut to `blocks` and counted there."""
        inside = _overlap(info.span, blocks)
        point = usable_point(info, self._facts.num_blocks)
        if inside is None or point is None:
            return None
        first = blocks.start
        return dataclasses.replace(point, start=inside.start - first, end=inside.end - first)

    def _links(self, servers: Sequence[ServerInfo]) -> dict[str, dict[str, float]]:
        """Round-trip times that the client measured, and those that servers claim of each other."""
        table: dict[str, dict[str, float]] = {CLIENT: {}}
        known = {info.peer_id for info in servers}
        claims: dict[tuple[PeerId, PeerId], float] = {}
        for info in servers:
            measured = self._rtt.get(info.peer_id)
            if measured is not None:
                table[CLIENT][info.peer_id] = measured
            for peer_id, rtt_ms in info.next_rtt_ms.items():
                if peer_id in known and peer_id != info.peer_id:
                    pair = min(info.peer_id, peer_id), max(info.peer_id, peer_id)
                    # Of two claims the worse counts: no server gains by saying that it is near.
                    claims[pair] = max(rtt_ms, claims.get(pair, 0.0))
        self._charge_suspects(claims, table[CLIENT], known)
        for (one, other), rtt_ms in claims.items():
            table.setdefault(one, {})[other] = rtt_ms
        return table

    def _charge_suspects(
        self,
        between: dict[tuple[PeerId, PeerId], float],
        from_client: dict[PeerId, float],
        known: Set[PeerId],
    ) -> None:
        """Lengthen the links of servers that are part of avoided pairs, and those of the pairs.

        A visit takes half of the link that enters a server and half of the one that leaves it.
        """
        suspicion: defaultdict[PeerId, float] = defaultdict(float)
        for (one, other), weight in self.avoided_edges.items():
            if one in known and other in known:
                between[min(one, other), max(one, other)] = 2 * weight * _AVOIDED_MS
            for peer_id in {one, other} & known:
                suspicion[peer_id] += weight
        for suspect, weight in suspicion.items():
            extra_ms = weight * _AVOIDED_MS
            from_client[suspect] = from_client.get(suspect, _DEFAULT_RTT_MS) + extra_ms
            for other in known:
                if other != suspect:
                    pair = min(suspect, other), max(suspect, other)
                    between[pair] = between.get(pair, _DEFAULT_RTT_MS) + extra_ms

    def _links_into(
        self, gap: Gap, links: Mapping[str, Mapping[str, float]], known: Collection[PeerId]
    ) -> dict[str, float]:
        """Round-trip times between those who may fill a gap and both its sides, averaged."""

        def rtt_ms(one: str, other: str) -> float:
            if one == other:
                return 0.0
            found = links.get(one, {}).get(other, links.get(other, {}).get(one))
            return _DEFAULT_RTT_MS if found is None else found

        return {
            peer_id: (rtt_ms(gap.before, peer_id) + rtt_ms(gap.after, peer_id)) / 2
            for peer_id in known
        }

    def _make_optimizer(self, seed: int) -> ChainOptimizer:
        """The optimizer of the settings; those that draw among equals draw by `seed`."""
        config = self._config
        offered = {"spread": config.chain_spread, "doubt": config.chain_doubt, "seed": seed}
        return OPTIMIZERS.create_from(config.chain_optimizer, **offered)

    def _optimize(
        self, snapshot: SwarmSnapshot, tokens: int, seed: int | None, gap: Gap | None
    ) -> Chain:
        blocks = self.remote if gap is None else gap.span
        first = blocks.start
        optimizer = self._make_optimizer(self._rng.getrandbits(32) if seed is None else seed)
        try:
            chain = optimizer.plan(snapshot, self._request(tokens, gap))
        except MissingBlocksError as error:
            missing = tuple((start + first, end + first) for start, end in error.missing)
            text = f"no usable server holds {spans_text(missing)}"
            raise MissingBlocksError(text, missing) from error
        except NoChainAvailable as error:
            if not first:
                raise
            raise NoChainAvailable(
                f"some of blocks {blocks} have no server with free cache for {tokens} "
                "tokens; ask for fewer tokens or try again later"
            ) from error
        return self._shifted(chain, first)

    def _request(self, tokens: int, gap: Gap | None) -> ChainRequest:
        blocks = self.remote if gap is None else gap.span
        trusted = {
            BlockSpan(inside.start - blocks.start, inside.end - blocks.start): names
            for span, names in self.trusted.items()
            if (inside := _overlap(span, blocks)) is not None
        }
        return ChainRequest(tokens=tokens, trusted=trusted)

    def _require_length(
        self, usable: Sequence[ServerInfo], long_enough: Sequence[ServerInfo], tokens: int
    ) -> None:
        """Tell a sequence that no chain can hold from blocks that nobody serves."""
        if self.snapshot(usable, 1).missing_blocks():
            return
        if self.snapshot(long_enough, 1).missing_blocks():
            longest = max(info.max_session_tokens for info in usable)
            raise SessionLengthError(
                f"a sequence of {tokens} tokens is longer than this swarm's servers take "
                f"(at most {longest}); shorten it or start servers with a larger "
                "--inference_max_length"
            )


def _hop_overhead_ms(servers: Sequence[ServerInfo]) -> float:
    """One number for all, as the cost model has it: the median, which few liars cannot move."""
    announced = [info.hop_overhead_ms for info in servers]
    return statistics.median(announced) if announced else 0.0


def spans_text(missing: Sequence[tuple[int, int]]) -> str:
    """Spans of blocks in words."""
    return "blocks " + ", ".join(f"{start}:{end}" for start, end in missing)


def _overlap(one: BlockSpan, other: BlockSpan) -> BlockSpan | None:
    start, end = max(one.start, other.start), min(one.end, other.end)
    return BlockSpan(start, end) if start < end else None


def _clipped(missing: Iterable[tuple[int, int]], span: BlockSpan) -> list[tuple[int, int]]:
    clipped = [(max(start, span.start), min(end, span.end)) for start, end in missing]
    return [(start, end) for start, end in clipped if start < end]
