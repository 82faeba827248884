"""Where the time of one text goes, hop by hop.

Known are: how long each step takes here, what each hop says of its time per block, and the
round-trip times that client and servers have measured. What is left of a step is encryption,
queues, batching and whatever else nobody has measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from pydantic import BaseModel

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.session_core import SessionCore
from planetserve.types import Chain, PeerId, ServerInfo

_PERIOD_S = 0.5
"""Between two reports on a chain that stays the same."""


class HopReport(BaseModel):
    """One server's part of a text."""

    peer_id: str
    name: str
    """What its owner calls it; may be empty."""
    start: int
    end: int
    link_ms: float | None
    """On the way to it: half a round trip; null if nobody has measured it."""
    compute_ms: float | None
    """One token in its blocks, by its own word."""


class ChainReport(BaseModel):
    """The servers that compute one text, and where the time of a token goes: means since the text
    came to this chain."""

    index: int
    """The first of the answers that this is about."""
    hops: list[HopReport]
    return_ms: float | None
    """On the way back from the last server."""
    head_ms: float
    """Final norm, head, sampling and embedding in the gateway."""
    step_ms: float
    """One step around the chain: links, servers and the rest."""
    other_ms: float
    """The rest: encryption, queues, batching, and links that are not measured."""
    prompt_ms: float
    """The prompt's way through the chain."""
    num_steps: int
    """Tokens of which these are the means."""


class ChainTimer:
    """Adds up the times of one text.

    Args:
        manager: knows the servers and links.
        session: the text's.
        count: told of every step's seconds and of the chain's hops.
        index: of its first answer.
        is_wanted: whether anybody wants reports.
    """

    def __init__(
        self,
        manager: ChainManager,
        session: SessionCore,
        count: Callable[[float, int], None],
        index: int,
        is_wanted: bool,
    ):
        self._manager = manager
        self._count = count
        self._session = session
        self._index = index
        self._is_wanted = is_wanted
        self._chain: Chain | None = None
        self._prompt_s = self._step_s = self._head_s = 0.0
        self._num_steps = self._num_heads = 0
        self._reported_s = float("-inf")

    @contextlib.contextmanager
    def prompt(self) -> Iterator[None]:
        """The prompt goes through the chain in this block."""
        began_s = time.monotonic()
        yield
        self._prompt_s = time.monotonic() - began_s
        self._see_chain()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step goes around it. One during which the chain changes counts for none."""
        began_s = time.monotonic()
        yield
        if not self._see_chain() and self._chain is not None:
            elapsed_s = time.monotonic() - began_s
            self._num_steps += 1
            self._step_s += elapsed_s
            self._count(elapsed_s, len(self._chain))

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """Tokens are chosen in this block."""
        began_s = time.monotonic()
        yield
        self._num_heads += 1
        self._head_s += time.monotonic() - began_s

    def report_to(self, put: Callable[[ChainReport], None], *, is_last: bool) -> None:
        """Report, if anybody wants it and the latest report is old or of another chain."""
        if not self._is_wanted or self._chain is None:
            return
        now_s = time.monotonic()
        if is_last or now_s - self._reported_s >= _PERIOD_S:
            self._reported_s = now_s
            put(self._report(self._chain))

    def _see_chain(self) -> bool:
        """Begin anew if the chain has changed; returns whether it has."""
        chain = self._session.chain
        if chain is self._chain:
            return False
        self._chain = chain
        self._step_s, self._num_steps = 0.0, 0
        self._reported_s = float("-inf")
        return True

    def _report(self, chain: Chain) -> ChainReport:
        servers, rtt_ms = self._manager.view.servers, self._manager.peers.rtt_ms()
        ring = self._session.ring
        loads_ms = {} if ring is None else ring.loads_ms
        hops = []
        before: ServerInfo | None = None
        for number, hop in enumerate(chain):
            info = servers.get(hop.peer_id)
            known = before.next_rtt_ms if before is not None else {} if number else rtt_ms
            load_ms = loads_ms.get(hop.peer_id) or (info and info.decode_ms_per_block)
            overhead_ms = info.hop_overhead_ms if info is not None else 0.0
            hops.append(
                HopReport(
                    peer_id=hop.peer_id,
                    name=info.public_name if info is not None else "",
                    start=hop.start,
                    end=hop.end,
                    link_ms=_half(known.get(hop.peer_id)),
                    compute_ms=None if not load_ms else _ms(
                        load_ms * len(hop.span) + overhead_ms
                    ),
                )
            )  # fmt: skip
            before = info
        return_ms = _half(rtt_ms.get(_last(chain)))
        step_ms = 1000 * self._step_s / max(1, self._num_steps)
        parts = [return_ms, *(hop.link_ms for hop in hops), *(hop.compute_ms for hop in hops)]
        return ChainReport(
            index=self._index,
            hops=hops,
            return_ms=return_ms,
            head_ms=_ms(1000 * self._head_s / max(1, self._num_heads)),
            step_ms=_ms(step_ms),
            other_ms=_ms(max(0.0, step_ms - sum(part or 0.0 for part in parts))),
            prompt_ms=_ms(1000 * self._prompt_s),
            num_steps=self._num_steps,
        )


def _last(chain: Chain) -> PeerId:
    return chain.hops[-1].peer_id


def _half(rtt_ms: float | None) -> float | None:
    return None if rtt_ms is None else _ms(rtt_ms / 2)


def _ms(value: float) -> float:
    return round(value, 3)
