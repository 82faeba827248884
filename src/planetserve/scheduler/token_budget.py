"""How many tokens of which session a batch takes: decode steps first, then longer ones."""

from __future__ import annotations

from collections.abc import Sequence

from planetserve.scheduler.policies import POLICIES, Candidate, Grant, SchedulingPolicy

PREFILL_SHARE = 8
"""Part of a full budget, as a divisor, that decode steps leave to waiting prefill; so the smallest
budget, in tokens, that can be shared."""


class TokenBudget:
    """Divides the tokens of a batch among ready sessions.

    Args:
        max_batch_tokens: how many these are, `PREFILL_SHARE` at least.
        policy: name of the scheduling policy; decode steps and longer ones have one each.

    Raises:
        ConfigError: no such policy.
    """

    def __init__(self, max_batch_tokens: int, policy: str):
        self._max_batch_tokens = max_batch_tokens
        self._decode_policy: SchedulingPolicy = POLICIES.create(policy)
        self._prefill_policy: SchedulingPolicy = POLICIES.create(policy)

    def share(
        self,
        decode: Sequence[Candidate],
        prefill: Sequence[Candidate],
        max_prefill_tokens: int | None = None,
    ) -> list[Grant]:
        """Grants of the next batch, those of decode steps first.

        Args:
            decode: sessions whose oldest step is a decode step.
            prefill: the other ready sessions.
            max_prefill_tokens: limit for the latter; they get one token at least if nobody decodes.
        """
        budget = self._max_batch_tokens
        grants: list[Grant] = []
        if decode:
            reserved = budget // PREFILL_SHARE if prefill else 0
            grants = _share(self._decode_policy, decode, budget - reserved)
            budget -= sum(grant.num_tokens for grant in grants)
        if max_prefill_tokens is not None:
            budget = min(budget, max(0 if decode else 1, max_prefill_tokens))
        if prefill and budget > 0:
            grants += _share(self._prefill_policy, prefill, budget)
        return grants


def _share(policy: SchedulingPolicy, candidates: Sequence[Candidate], budget: int) -> list[Grant]:
    if sum(candidate.num_tokens for candidate in candidates) <= budget:
        return [Grant(candidate.session_id, candidate.num_tokens) for candidate in candidates]
    return policy.share(candidates, budget)
