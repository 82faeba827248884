"""How much of what strangers answer a look-up checks and keeps."""

from __future__ import annotations

from planetserve.swarm.dht.hivemind_limits import MAX_RECORDS_PER_KEY
from planetserve.swarm.dht.lookup_results import MAX_PER_KEY, MORE_PER_ANSWER, LookupResults

KEY = b"key"


def answer(lookup_results: LookupResults, owners: list[str], ends_s: float = 1.0) -> list[str]:
    """Whose records are checked; all are good."""
    chosen = lookup_results.choose(KEY, dict.fromkeys(owners, ends_s))
    lookup_results.add(KEY, {owner: (b"envelope", ends_s) for owner in chosen})
    return chosen


def crowd(name: str) -> list[str]:
    return [f"{name} {number}" for number in range(MAX_RECORDS_PER_KEY)]


def test_a_record_is_checked_once_unless_a_newer_one_comes() -> None:
    lookup_results = LookupResults([KEY])
    assert answer(lookup_results, ["a", "b"]) == ["a", "b"]
    assert answer(lookup_results, ["a", "b", "c"]) == ["c"]
    assert answer(lookup_results, ["a"], ends_s=2.0) == ["a"]
    assert answer(lookup_results, ["a"], ends_s=1.5) == []
    assert lookup_results.records[KEY]["a"] == (b"envelope", 2.0)


def test_crowds_of_made_up_owners_are_bounded_and_hide_nobody() -> None:
    lookup_results = LookupResults([KEY])
    num_checked = sum(len(answer(lookup_results, crowd(f"liar {liar}"))) for liar in range(19))
    assert num_checked == MAX_RECORDS_PER_KEY + 18 * MORE_PER_ANSWER
    honest = [f"honest {number}" for number in range(MORE_PER_ANSWER)]
    assert answer(lookup_results, honest) == honest
    assert set(honest) < lookup_results.records[KEY].keys()


def test_honest_peers_add_different_ones_where_a_crowd_came_first() -> None:
    lookup_results = LookupResults([KEY])
    answer(lookup_results, crowd("liar"))
    honest = [f"honest {number}" for number in range(40)]
    found = {owner for _ in range(20) for owner in answer(lookup_results, honest)}
    assert found == set(honest)


def test_nothing_is_kept_without_end() -> None:
    lookup_results = LookupResults([KEY])
    for liar in range(200):
        answer(lookup_results, crowd(f"liar {liar}"))
    assert len(lookup_results.records[KEY]) == MAX_PER_KEY
    assert answer(lookup_results, ["honest"]) == []
