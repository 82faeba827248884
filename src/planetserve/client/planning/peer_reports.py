"""Collects what peers reported during one step, for the error that the step may end with."""

from __future__ import annotations

from collections import Counter

from planetserve.errors import (
    NoChainAvailable,
    PeerReportedError,
    PlanetServeError,
    RefusedByServers,
)

_MAX_SHOWN = 3


class Reports:
    """The reports during one step, over all its attempts."""

    def __init__(self) -> None:
        self._said: Counter[str] = Counter()

    def add(self, error: PlanetServeError) -> None:
        """Record the error of an attempt."""
        for one in (error, *error.others):
            if isinstance(one, PeerReportedError):
                self._said[str(one)] += 1

    def final(self, error: PlanetServeError, num_attempts: int) -> PlanetServeError:
        """The error to raise after the last attempt, which failed with `error`."""
        if not self._said:
            return error
        if isinstance(error, PeerReportedError):
            return RefusedByServers(
                f"no server ran this in {num_attempts} attempts: {self._summary()}; "
                "try again later, or start servers of yours"
            )
        if isinstance(error, NoChainAvailable):
            error.args = (f"{error} (before that, {self._summary()})", *error.args[1:])
        return error

    def _summary(self) -> str:
        shown = [
            line if count == 1 else f"{line} ({count} times)"
            for line, count in self._said.most_common(_MAX_SHOWN)
        ]
        if len(self._said) > len(shown):
            shown.append(f"and {len(self._said) - len(shown)} more")
        return "; ".join(shown)
