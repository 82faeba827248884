"""First come, first served: the oldest item takes what it can, then the next one.

The order of ORCA's scheduler. Simple and predictable; a session with long prompts can delay others
for as long as its oldest prompt takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from planetserve.scheduler.policies.base import Candidate, Grant


class Fcfs:
    """Oldest item first."""

    def share(self, candidates: Sequence[Candidate], budget: int) -> list[Grant]:
        grants: list[Grant] = []
        for candidate in sorted(candidates, key=lambda item: item.arrival):
            if candidate.min_tokens > budget and grants:
                break
            tokens = max(candidate.min_tokens, min(candidate.num_tokens, budget))
            grants.append(Grant(candidate.session_id, tokens))
            budget -= tokens
            if budget <= 0:
                break
        return grants
