"""Whether a pass should wait a moment for decode steps that are about to come back.

A pass of few tokens takes hardly longer than one of a single token, because it reads the same
weights. Without waiting, two sessions on one server alternate: the step of one returns while the
step of the other runs, so each round of tokens costs two passes. If the server waits until both
steps are there, they share a pass, and go on sharing passes, because they are answered together.
Let `R` be the seconds until all sessions that are answered together are back, and `F` the part of a
pass that does not depend on its tokens. A round then takes slightly more than `R + F` instead of
twice `F`, so waiting can pay while `R < F`. The limit used is lower, because a server that waits
does not compute while its clients do. There is no waiting where the return takes longer, as over
the other stages of a chain or a slow link.

The return time of each session is estimated as TCP estimates round-trip times (RFC 6298, section
2): a mean and a mean deviation. `R` grows with the number of sessions where one client serves
several; `R` and `F` are read from linear fits of recent measurements. A session that does not
return, because its text has ended, causes one wait.

Pure: times come in as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from planetserve.types import BlockSpan

_MEAN_WEIGHT = 1 / 8
_DEVIATION_WEIGHT = 1 / 4
_DEVIATIONS = 2
"""Number of mean deviations past the mean return time after which a step is late."""
_PAUSE_S = 1.0
"""Seconds after which a session counts as paused; its return time is then not a measurement."""
_NEWEST_WEIGHT = 0.05
_SLOPE_WEIGHT = 0.25
"""Weight of the likely slope in a fit, as a variance of the numbers."""


class _AwayTime:
    """Mean and deviation of the time from a result to the next step (estimated as in RFC 6298)."""

    def __init__(self) -> None:
        self.mean_s = math.inf
        """Infinite before the first sample."""
        self._deviation_s = 0.0

    @property
    def late_s(self) -> float:
        """Seconds after which the next step is late."""
        return self.mean_s + _DEVIATIONS * self._deviation_s

    def add(self, sample_s: float) -> None:
        if sample_s > _PAUSE_S:
            return
        if self.mean_s < math.inf:
            off_s = abs(sample_s - self.mean_s)
            self._deviation_s += _DEVIATION_WEIGHT * (off_s - self._deviation_s)
            self.mean_s += _MEAN_WEIGHT * (sample_s - self.mean_s)
        else:
            self.mean_s, self._deviation_s = sample_s, sample_s / 2


class _Cohort:
    """Sessions with short round trips that one batch has answered."""

    def __init__(self, members: Collection[bytes], answered_s: float):
        self.size = len(members)
        self.away = set(members)
        self.answered_s = answered_s


class _Session:
    def __init__(self, span: BlockSpan):
        self.span = span
        self.away_time = _AwayTime()
        self.answered_s: float | None = None
        self.cohort: _Cohort | None = None


class LineFit:
    """A linear fit of a time against a number, by exponentially weighted least squares."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._number = self._time_s = self._variance = self._covariance = 0.0

    def record(self, number: float, time_s: float) -> None:
        """Add a measurement; older ones lose weight."""
        self._weight += _NEWEST_WEIGHT * (1 - self._weight)
        share = _NEWEST_WEIGHT / self._weight
        off_number, off_s = number - self._number, time_s - self._time_s
        self._number += share * off_number
        self._time_s += share * off_s
        self._variance += share * ((1 - share) * off_number**2 - self._variance)
        self._covariance += share * ((1 - share) * off_number * off_s - self._covariance)

    def at(self, number: float, likely_slope_s: float = 0.0) -> float:
        """The time that belongs to `number`, at least 0; 0 before the first measurement.

        Args:
            number: of what was measured.
            likely_slope_s: what one more takes. Counts while all measurements are of nearly the
                same number.
        """
        slope_s = self._covariance + _SLOPE_WEIGHT * likely_slope_s
        slope_s = max(slope_s / (self._variance + _SLOPE_WEIGHT), 0.0)
        return max(self._time_s + slope_s * (number - self._number), 0.0)


class BatchDelay:
    """Decides for one engine how long its next pass waits.

    Args:
        patience: waiting may cost this many times what a shared pass saves; 0 for no waiting.
    """

    def __init__(self, patience: float):
        self._patience = patience
        self._block_times = LineFit()
        """Time per block of passes of decode steps, by tokens."""
        self._return_times = LineFit()
        """Time until the last of the sessions answered together is back, by their number."""
        self._saved_s = 0.0
        """What a shared pass saves for each block, times `patience`."""
        self._sessions: dict[bytes, _Session] = {}
        self._away: dict[bytes, float] = {}
        """Sessions that return sooner than a pass takes, and the times at which they are late."""

    def open(self, session_id: bytes, span: BlockSpan) -> None:
        """A session over `span` begins."""
        self._sessions[session_id] = _Session(span)

    def forget(self, session_id: bytes) -> None:
        """The session has ended."""
        self._sessions.pop(session_id, None)
        self._away.pop(session_id, None)

    def record(self, num_tokens: float, num_blocks: int, elapsed_s: float) -> None:
        """Record a pass of decode steps alone."""
        self._block_times.record(num_tokens, elapsed_s / num_blocks)

    def answered(self, session_ids: Collection[bytes], now_s: float, likely_token_s: float) -> None:
        """The results of decode steps that shared a pass are on their way.

        Args:
            session_ids: whose.
            now_s: monotonic time.
            likely_token_s: what a token takes in each block of a large pass.
        """
        self._saved_s = self._patience * self._block_times.at(0, likely_token_s)
        near = []
        for session_id in session_ids:
            session = self._sessions.get(session_id)
            if session is None:
                continue
            session.answered_s, session.cohort = now_s, None
            most_s = self._saved_s * len(session.span)
            if session.away_time.mean_s < most_s:
                self._away[session_id] = now_s + min(session.away_time.late_s, most_s)
                near.append(session_id)
        cohort = _Cohort(near, now_s)
        for session_id in near:
            self._sessions[session_id].cohort = cohort

    def returned(self, session_id: bytes, now_s: float) -> None:
        """A step of the session has come."""
        self._away.pop(session_id, None)
        session = self._sessions.get(session_id)
        if session is None or session.answered_s is None:
            return
        session.away_time.add(max(0.0, now_s - session.answered_s))
        cohort, session.answered_s, session.cohort = session.cohort, None, None
        if cohort is not None:
            cohort.away.discard(session_id)
            if not cohort.away and now_s - cohort.answered_s <= _PAUSE_S:
                self._return_times.record(cohort.size, now_s - cohort.answered_s)

    def wait_s(self, ready: Collection[bytes], now_s: float) -> float:
        """Seconds for which the decode steps of `ready` should wait for others; 0: run them now."""
        for session_id, late_s in list(self._away.items()):
            if late_s <= now_s:
                del self._away[session_id]
        if not self._away:
            return 0.0
        spans = {self._sessions[session_id].span for session_id in ready}
        latest_s, num_together, most_s = now_s, len(ready), math.inf
        for session_id, late_s in self._away.items():
            session = self._sessions[session_id]
            saved_s = self._saved_s * max(len(session.span.overlap(span)) for span in spans)
            if session_id not in ready and session.away_time.mean_s < saved_s:
                latest_s = max(latest_s, late_s)
                num_together += 1
                most_s = min(most_s, saved_s)
        return latest_s - now_s if self._return_times.at(num_together) < most_s else 0.0
