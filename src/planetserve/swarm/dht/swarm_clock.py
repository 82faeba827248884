"""The time that a swarm goes by: this machine's, corrected by what its initial peers say.

Directory records end at a Unix time, and the clocks of home machines may be minutes off. A node
that joins takes over the time of those it joins through, so that all of a swarm go by the time of
whoever began it; what is right in the world does not matter to the directory. Only initial peers
are asked, since a node depends on them anyhow, and of several the one in the middle counts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from planetserve.clock import Clock
from planetserve.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_OFFSET_S = 900.0
"""Maximum clock error in seconds that is corrected; a clock with a larger one should be set."""
_UNNOTICED_S = 3.0
"""Clock error in seconds that records tolerate and that is not corrected."""


class SwarmClock:
    """A clock whose Unix time is the swarm's.

    Args:
        clock: this machine's.
    """

    def __init__(self, clock: Clock):
        self.offset_s = 0.0
        """What is added to this machine's Unix time."""
        self._clock = clock

    def monotonic(self) -> float:
        """As of the machine's clock."""
        return self._clock.monotonic()

    def unix(self) -> float:
        """The swarm's time."""
        return self._clock.unix() + self.offset_s

    def local_unix(self) -> float:
        """This machine's own time, against which others' is measured."""
        return self._clock.unix()

    def correct(self, offsets_s: Collection[float]) -> None:
        """Take over the time of initial peers.

        Args:
            offsets_s: by how much each is ahead of this machine.

        Raises:
            ConfigError: this machine's clock is too far off; nothing is changed.
        """
        if not offsets_s:
            return
        offset_s = _middle(offsets_s)
        if not abs(offset_s) <= MAX_OFFSET_S:
            raise ConfigError(
                f"this machine's clock is {_off(offset_s)} the initial peers'; set it "
                "(`timedatectl set-ntp true` on most Linux systems) and start again"
            )
        if abs(offset_s) <= _UNNOTICED_S:
            offset_s = 0.0
        if abs(offset_s - self.offset_s) > _UNNOTICED_S:
            if offset_s:
                logger.warning(
                    "this machine's clock is %s the initial peers'; the directory goes by theirs, "
                    "but it should be set (`timedatectl set-ntp true` on most Linux systems)",
                    _off(offset_s),
                )
            self.offset_s = offset_s


def _middle(offsets_s: Collection[float]) -> float:
    """The median; of two in the middle the one that is nearer to this machine's time."""
    ordered = sorted(offsets_s)
    half = len(ordered) // 2
    return min(ordered[(len(ordered) - 1) // 2 : half + 1], key=abs)


def _off(offset_s: float) -> str:
    return f"{abs(offset_s):,.0f} s {'behind' if offset_s > 0 else 'ahead of'}"
