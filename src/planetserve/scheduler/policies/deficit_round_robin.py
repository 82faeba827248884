"""Deficit round robin over token counts: every ready session gets the same share of tokens.

Shreedhar and Varghese's scheme (SIGCOMM 1995): sessions take turns; a turn adds a quantum to the
session's allowance, and it may run as many tokens as its allowance holds. An allowance is kept
while the session waits and forgotten when it has nothing to run, so idle time earns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from planetserve.errors import ConfigError
from planetserve.scheduler.policies.base import Candidate, Grant


class DeficitRoundRobin:
    """Equal token shares.

    Args:
        quantum: tokens a session earns per turn.
    """

    def __init__(self, quantum: int = 64):
        if quantum < 1:
            raise ConfigError(f"quantum {quantum} must be at least 1 token")
        self._quantum = quantum
        # Session -> allowance; the order of the keys is the order of turns.
        self._allowances: dict[bytes, int] = {}

    def share(self, candidates: Sequence[Candidate], budget: int) -> list[Grant]:
        waiting = {candidate.session_id: candidate for candidate in candidates}
        allowances = {key: value for key, value in self._allowances.items() if key in waiting}
        for session_id in waiting:
            allowances.setdefault(session_id, 0)
        granted: dict[bytes, int] = {}
        left = budget
        while waiting and left > 0:
            session_id = next(iter(allowances))
            candidate = waiting[session_id]
            allowance = allowances.pop(session_id) + self._quantum
            done = granted.get(session_id, 0)
            tokens = min(candidate.num_tokens - done, allowance, left)
            if tokens + done < candidate.min_tokens:
                tokens = candidate.min_tokens
                if tokens > allowance:
                    allowances[session_id] = allowance
                    continue
                if granted:
                    # It has saved enough but does not fit any more: first in the next tick.
                    allowances = {session_id: allowance} | allowances
                    break
            granted[session_id] = done + tokens
            left -= tokens
            if done + tokens == candidate.num_tokens:
                del waiting[session_id]
            else:
                allowances[session_id] = allowance - tokens
        self._allowances = allowances
        return [Grant(session_id, tokens) for session_id, tokens in granted.items()]
