"""A session's chain in the simulation, and the steps that travel around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from planetserve.simulation.world import Links
from planetserve.types import Chain, Hop


class StepListener(Protocol):
    """Events of a ring that its session handles."""

    def result(self, step: Step) -> None:
        """A step has passed all hops, or has filled the hops that it had to fill."""
        ...

    def server_leaves(self, server: int) -> None:
        """A server has announced that it leaves."""
        ...

    def lost(self, server: int) -> None:
        """A server has been found silent."""
        ...


class Ring:
    """One per session, whatever chain it runs on. Compared by identity.

    Args:
        session: whose.
        ring_id: unique.
        client_name: name of its client; the sessions of one client count together.
        client_node: the client's node in `links`.
        links: half round-trip times between nodes.
        number_of: server ids to their numbers.
    """

    def __init__(
        self,
        session: StepListener,
        ring_id: bytes,
        client_name: str,
        client_node: int,
        links: Links,
        number_of: Mapping[str, int],
    ):
        self.session = session
        self.id = ring_id
        self.client_name = client_name
        self.epoch = 0
        """Increased whenever the steps under way have become invalid."""
        self.chain = Chain(())
        self.servers: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.half_s: list[float] = []
        """From the client to the first server, from each server to the next, back to the client."""
        self._client_node = client_node
        self._links = links
        self._number_of = number_of

    def set_chain(self, chain: Chain) -> None:
        """Run on `chain` from now on."""
        client = self._client_node
        self.chain = chain
        self.servers = [self._number_of[hop.peer_id] for hop in chain]
        self.spans = [(hop.start, hop.end) for hop in chain]
        nodes = [client, *self.servers, client]
        half_ms = self._links.half_ms
        self.half_s = [half_ms(a, b) / 1000.0 for a, b in zip(nodes, nodes[1:], strict=False)]


@dataclass(slots=True, eq=False)
class Step:
    """Tokens of one session on their way around its ring, from hop `hop` to before hop `stop`."""

    ring: Ring
    epoch: int
    num_tokens: int
    is_last: bool
    """Whether it is the last step of its text so far, so that its result is a token."""
    hop: int = 0
    stop: int | None = None
    """Hop before which a step ends that only fills caches; None: it passes all hops."""
    arrived_s: float = 0.0
    num_left: int = 0
    is_alone: bool = False
    """Whether the server was idle when it came."""


def spliced(hops: Sequence[Hop], first: int, stop: int, entering: Sequence[Hop]) -> Chain:
    """The chain in which `entering` take the place of hops `first:stop`."""
    return Chain((*hops[:first], *entering, *hops[stop:]))
