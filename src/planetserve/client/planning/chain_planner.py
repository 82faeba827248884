"""Plans a chain over the blocks left to the swarm, from announced records and a client's settings.

Optimizers count blocks from 0, so the planner cuts off the blocks that the client runs itself, and
corrects the numbers after the plan. Records are signed, but say what their owners like: the planner
drops one that cannot be true of this model, or that no plan could use, so that only the server that
made it loses by it. Decisions only: no clock, no network and no state, so that threads may share a
planner.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from planetserve.client.planning.block_ranges import split_blocks, trusted_spans
from planetserve.client.planning.edge_suspicion import Edge
from planetserve.client.planning.peer_book import PlanInputs
from planetserve.client.ring.ring_spec import Gap
from planetserve.config import ClientConfig
from planetserve.errors import (
    MissingBlocksError,
    NoChainAvailable,
    SessionLengthError,
)
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.manifest import ReadManifest
from planetserve.routing.cost import latency_ms
from planetserve.routing.migration import move_ms, new_hops
from planetserve.routing.optimizers import ChainOptimizer, create_optimizer
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.server_points import usable_point
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.tensors import dtype_name
from planetserve.types import CLIENT, BlockSpan, Chain, PeerId, ServerInfo

_DEFAULT_RTT_MS = 50.0
_AVOIDED_MS = 5_000.0
"""Milliseconds charged for a pair of neighbours to avoid, and for each visit to a server of such a
pair, once per pair: more than any other chain costs."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a client knows of its model without asking a peer."""

    name: str
    prefix: str
    fingerprint: str
    num_blocks: int
    hidden_size: int
    dtype: torch.dtype
    read_manifest: ReadManifest | None = dataclasses.field(default=None, compare=False)
    """Reads what its weights are; takes long for a large model that was not read before."""

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
            read_manifest=checkpoint.manifest,
        )


class ChainPlanner:
    """Plans chains for one client.

    Raises:
        ConfigError: `local_blocks`, `trusted_blocks` or `chain_optimizer` is wrong.
    """

    def __init__(self, config: ClientConfig, facts: ModelFacts):
        self.remote = split_blocks(config, facts.num_blocks).remote
        """The blocks that the swarm runs."""
        self.trusted = {
            BlockSpan(inside.start, inside.stop): names
            for span, names in trusted_spans(config, facts.num_blocks).items()
            if (inside := span.overlap(self.remote))
        }
        """Remote blocks that only some servers may run, by their true numbers."""
        self._config = config
        self._make_optimizer(0)  # a mistyped name should fail here
        self._facts = facts

    def plan(
        self,
        inputs: PlanInputs,
        num_rows: int,
        lease_tokens: int,
        seed: int,
        gap: Gap | None = None,
    ) -> Chain:
        """The chain that the optimizer picks for a session of this size.

        Args:
            inputs: the servers that may be used, and what is known of them.
            num_rows: sequences in the session's batch.
            lease_tokens: tokens of each that every hop must have room for.
            seed: decides among chains that are nearly equal, so that sessions spread over them;
                below 2^32.
            gap: plan only the hops that fill it.

        Raises:
            MissingBlocksError: some blocks are held by none of them that may run them.
            NoChainAvailable: they lack free cache.
            SessionLengthError: none of them takes sequences this long.
        """
        chosen = self.candidates(inputs, num_rows, lease_tokens, gap)
        return self._optimize(
            self.snapshot(chosen, num_rows, gap), num_rows * lease_tokens, seed, gap
        )

    def candidates(
        self,
        inputs: PlanInputs,
        num_rows: int,
        lease_tokens: int,
        gap: Gap | None = None,
    ) -> PlanInputs:
        """The inputs with the servers that a session of this size is planned on.

        Servers that compute in this client's dtype with weights as they are, if these have a chain;
        else all that take sequences this long.

        Raises:
            SessionLengthError: none of them takes sequences this long.
        """
        long_enough = inputs.only(
            info for info in inputs.servers if info.max_session_tokens >= lease_tokens
        )
        if len(long_enough.servers) < len(inputs.servers):
            self._require_length(inputs, long_enough, lease_tokens)
        alike = inputs.only(info for info in long_enough.servers if self._is_alike(info))
        if len(alike.servers) < len(long_enough.servers):
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
            inside = info.span.overlap(self.remote)
            if not inside:
                continue
            blocks = np.zeros(len(self.remote), dtype=bool)
            blocks[inside.start - self.remote.start : inside.stop - self.remote.start] = True
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

    def all_alike(self, servers: Iterable[ServerInfo]) -> bool:
        """Whether all compute in this client's dtype, with weights as they are."""
        return all(self._is_alike(info) for info in servers)

    def _is_alike(self, info: ServerInfo) -> bool:
        is_exact = info.quant_type in ("none", "stored")
        return info.dtype == dtype_name(self._facts.dtype) and is_exact

    def snapshot(self, inputs: PlanInputs, num_rows: int, gap: Gap | None = None) -> SwarmSnapshot:
        """What the optimizer plans on. Its block 0 is the first one that the swarm runs.

        With `gap`, its block 0 is the first of the gap, and the place of the client is taken by
        the hops on both sides of it.
        """
        blocks = self.remote if gap is None else gap.span
        points = [
            point for info in inputs.servers if (point := self._point(info, blocks)) is not None
        ]
        known = {point.id for point in points}
        usable = inputs.only(info for info in inputs.servers if info.peer_id in known)
        links = _links(usable)
        if gap is not None:
            links[CLIENT] = _links_into(gap, _links(inputs), known)
        return SwarmSnapshot(
            num_blocks=len(blocks),
            activation_bytes_per_token=(
                self._facts.hidden_size * self._facts.dtype.itemsize * num_rows
            ),
            hop_overhead_ms=_hop_overhead_ms(usable.servers),
            default_rtt_ms=_DEFAULT_RTT_MS,
            servers=tuple(points),
            rtt_ms=links,
        )

    def latency_ms(self, inputs: PlanInputs, num_rows: int, chain: Chain) -> float | None:
        """Predicted time per token of a chain in ms, with what is charged for suspects; None if one
        of its hops is not among the servers."""
        snapshot = self.snapshot(inputs, num_rows)
        if not all(hop.peer_id in snapshot.index for hop in chain):
            return None
        return latency_ms(snapshot, self._shifted(chain, -self.remote.start))

    def move_ms(
        self, inputs: PlanInputs, num_rows: int, position: int, old: Chain, new: Chain
    ) -> float:
        """Time in ms to bring a session of `position` tokens per row from one chain to another, all
        of whose hops are among the servers."""
        first, last = new_hops(old.hops, new.hops)
        shifted = self._shifted(new, -self.remote.start).hops
        entering = shifted[first : len(shifted) - last]
        return move_ms(self.snapshot(inputs, num_rows), entering, position, num_rows)

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
        inside = info.span.overlap(blocks)
        point = usable_point(info, self._facts.num_blocks)
        if not inside or point is None:
            return None
        first = blocks.start
        return dataclasses.replace(point, start=inside.start - first, end=inside.stop - first)

    def _make_optimizer(self, seed: int) -> ChainOptimizer:
        """The optimizer of the settings; those that draw among equals draw by `seed`."""
        config = self._config
        return create_optimizer(
            config.chain_optimizer,
            cost_jitter=config.chain_cost_jitter,
            load_prior=config.chain_load_prior,
            seed=seed,
        )

    def _optimize(self, snapshot: SwarmSnapshot, tokens: int, seed: int, gap: Gap | None) -> Chain:
        blocks = self.remote if gap is None else gap.span
        first = blocks.start
        optimizer = self._make_optimizer(seed)
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
            BlockSpan(inside.start - blocks.start, inside.stop - blocks.start): names
            for span, names in self.trusted.items()
            if (inside := span.overlap(blocks))
        }
        return ChainRequest(tokens=tokens, trusted=trusted)

    def _require_length(self, usable: PlanInputs, long_enough: PlanInputs, tokens: int) -> None:
        """Tell a sequence that no chain can hold from blocks that nobody serves."""
        if self.snapshot(usable, 1).missing_blocks():
            return
        if self.snapshot(long_enough, 1).missing_blocks():
            longest = max(info.max_session_tokens for info in usable.servers)
            raise SessionLengthError(
                f"a sequence of {tokens} tokens is longer than this swarm's servers take "
                f"(at most {longest}); shorten it or start servers with a larger "
                "--inference_max_length"
            )


def _links(inputs: PlanInputs) -> dict[str, dict[str, float]]:
    """Round-trip times that the client measured, and those that servers claim of each other."""
    table: dict[str, dict[str, float]] = {CLIENT: {}}
    known = {info.peer_id for info in inputs.servers}
    claims: dict[Edge, float] = {}
    for info in inputs.servers:
        measured = inputs.rtt_ms.get(info.peer_id)
        if measured is not None:
            table[CLIENT][info.peer_id] = measured
        for peer_id, rtt_ms in info.next_rtt_ms.items():
            if peer_id in known and peer_id != info.peer_id:
                pair = min(info.peer_id, peer_id), max(info.peer_id, peer_id)
                # Of two claims the worse counts: no server gains by saying that it is near.
                claims[pair] = max(rtt_ms, claims.get(pair, 0.0))
    _charge_suspects(inputs.avoided_edges, claims, table[CLIENT], known)
    for (one, other), rtt_ms in claims.items():
        table.setdefault(one, {})[other] = rtt_ms
    return table


def _charge_suspects(
    avoided_edges: Mapping[Edge, float],
    between: dict[Edge, float],
    from_client: dict[PeerId, float],
    known: Set[PeerId],
) -> None:
    """Lengthen the links of servers that are part of avoided pairs, and those of the pairs.

    A visit takes half of the link that enters a server and half of the one that leaves it.
    """
    suspicion: defaultdict[PeerId, float] = defaultdict(float)
    for (one, other), weight in avoided_edges.items():
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
    gap: Gap, links: Mapping[str, Mapping[str, float]], known: Collection[PeerId]
) -> dict[str, float]:
    """Round-trip times between those who may fill a gap and both its sides, averaged."""

    def rtt_ms(one: str, other: str) -> float:
        if one == other:
            return 0.0
        found = links.get(one, {}).get(other, links.get(other, {}).get(one))
        return _DEFAULT_RTT_MS if found is None else found

    return {
        peer_id: (rtt_ms(gap.before, peer_id) + rtt_ms(gap.after, peer_id)) / 2 for peer_id in known
    }


def _hop_overhead_ms(servers: Sequence[ServerInfo]) -> float:
    """One number for all, as the cost model has it: the median, which few liars cannot move."""
    announced = [info.hop_overhead_ms for info in servers]
    return statistics.median(announced) if announced else 0.0


def spans_text(missing: Sequence[tuple[int, int]]) -> str:
    """Spans of blocks in words."""
    return "blocks " + ", ".join(f"{start}:{end}" for start, end in missing)


def _clipped(missing: Iterable[tuple[int, int]], span: BlockSpan) -> list[tuple[int, int]]:
    clipped = [(max(start, span.start), min(end, span.end)) for start, end in missing]
    return [(start, end) for start, end in clipped if start < end]
