"""What a scheduling policy decides: how a tick's token budget is divided among ready sessions.

A policy sees token counts only. It is asked only when the budget cannot take everything; steps that
all fit run together without it. One policy object serves one class of work (decode steps, or
prefill), and may keep state between ticks, keyed by session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Candidate(NamedTuple):
    """A session's oldest unfinished work item."""

    session_id: bytes
    arrival: int
    """Counts items in order of arrival: smaller is older."""
    num_tokens: int
    """Tokens of the item that have not run yet."""
    min_tokens: int
    """The smallest useful grant: 1, or all of `num_tokens` for a model that cannot be chunked."""


class Grant(NamedTuple):
    """Tokens that a session may run in this tick."""

    session_id: bytes
    num_tokens: int


class SchedulingPolicy(Protocol):
    """Divides a token budget."""

    def share(self, candidates: Sequence[Candidate], budget: int) -> list[Grant]:
        """Grants for this tick, each between the candidate's `min_tokens` and `num_tokens`.

        They add up to at most `budget`, except that a candidate whose `min_tokens` alone is over
        the budget may be the only grant. At least one candidate is served.
        """
        ...
