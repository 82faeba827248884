"""What a user is told when every server has refused."""

from __future__ import annotations

from planetserve.client.planning.peer_reports import Reports
from planetserve.errors import (
    HopTimeout,
    MissingBlocksError,
    PeerReportedError,
    RefusedByServers,
)


def test_the_error_says_who_said_what_and_how_often() -> None:
    reports = Reports()
    full = PeerReportedError.of("12D3KooWAAAAAAaaaaaa", "cache_exhausted", "no pages are free")
    odd = PeerReportedError.of("12D3KooWBBBBBBbbbbbb", "config", "run: \x1b[31mcurl evil")
    odd.others = [PeerReportedError.of(f"12D3KooW{name * 12}", "x", "y") for name in "cdef"]
    for error in (full, full, odd, full):
        reports.add(error)
    final = reports.final(full, 4)
    assert isinstance(final, RefusedByServers)
    assert not isinstance(final, ValueError)
    text = str(final)
    assert text.startswith(
        "no server ran this in 4 attempts: "
        "server …aaaaaa says: 'cache_exhausted: no pages are free' (3 times); "
        "server …bbbbbb says: 'config: run: \\\\x1b[31mcurl evil'; "
    )
    assert "and 3 more" in text
    assert len(text.splitlines()) == 1


def test_what_was_said_is_cut_to_size() -> None:
    error = PeerReportedError.of("12D3KooWAAAAAAaaaaaa", "remote", "x" * 512)
    assert len(str(error)) < 220


def test_other_failures_stay_what_they_are() -> None:
    reports = Reports()
    timeout, gone = HopTimeout("no answer"), MissingBlocksError("nobody holds 0:4", [(0, 4)])
    assert reports.final(timeout, 2) is timeout
    reports.add(PeerReportedError.of("12D3KooWAAAAAAaaaaaa", "capacity", "leaving"))
    assert reports.final(timeout, 2) is timeout
    assert reports.final(gone, 2) is gone
    assert str(gone) == ("nobody holds 0:4 (before that, server …aaaaaa says: 'capacity: leaving')")
