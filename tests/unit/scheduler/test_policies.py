"""Scheduling policies: budgets are kept, nobody starves, equal sessions get equal shares."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planetserve.errors import ConfigError
from planetserve.scheduler.policies import POLICIES, Candidate

SIZES = st.lists(
    st.tuples(st.integers(1, 900), st.booleans()), min_size=1, max_size=8
)  # tokens, all or nothing


@pytest.mark.parametrize("name", POLICIES.names())
@given(sizes=SIZES, budget=st.integers(1, 512))
def test_everything_is_served_within_budget(name, sizes, budget):
    policy = POLICIES.create(name)
    left = {bytes([i]): (tokens, whole) for i, (tokens, whole) in enumerate(sizes)}
    total = sum(tokens for tokens, _ in sizes)
    for _ in range(total + len(sizes)):
        candidates = [
            Candidate(session_id, session_id[0], tokens, tokens if whole else 1)
            for session_id, (tokens, whole) in left.items()
        ]
        grants = policy.share(candidates, budget)
        granted = {grant.session_id: grant.num_tokens for grant in grants}
        assert granted
        assert len(granted) == len(grants)
        assert sum(granted.values()) <= budget or len(grants) == 1
        for candidate in candidates:
            tokens = granted.get(candidate.session_id)
            if tokens is None:
                continue
            assert candidate.min_tokens <= tokens <= candidate.num_tokens
            assert tokens <= budget or tokens == candidate.min_tokens
            left[candidate.session_id] = (candidate.num_tokens - tokens, left[candidate[0]][1])
            if not left[candidate.session_id][0]:
                del left[candidate.session_id]
        if not left:
            return
    pytest.fail("some session starved")


def test_deficit_round_robin_gives_equal_shares():
    policy = POLICIES.create("deficit_round_robin", quantum=10)
    served: Counter[bytes] = Counter()
    for _ in range(50):
        candidates = [Candidate(bytes([i]), i, 10_000, 1) for i in range(5)]
        for session_id, tokens in policy.share(candidates, 64):
            served[session_id] += tokens
    assert sum(served.values()) == 50 * 64
    assert max(served.values()) - min(served.values()) <= 20


def test_fcfs_serves_the_oldest_first():
    policy = POLICIES.create("fcfs")
    candidates = [Candidate(b"new", 7, 50, 1), Candidate(b"old", 3, 50, 1)]
    assert policy.share(candidates, 60) == [(b"old", 50), (b"new", 10)]


def test_unknown_policy_lists_the_choices():
    with pytest.raises(ConfigError, match="deficit_round_robin, fcfs"):
        POLICIES.check("lifo")


def test_a_policy_checks_its_options():
    with pytest.raises(ConfigError, match="quantum"):
        POLICIES.create("deficit_round_robin", quantum=0)
