"""How fast a link takes what is sent over it, from the moments at which it takes no more.

Sending returns when the kernel has the bytes, so the time of a send says little: buffers on the way
take the first bytes at the speed of memory. But a send that has to wait, for longer than memory
ever takes, has found every buffer full. Between two such waits as many bytes have left at the far
end as were accepted at this one: their number by the time between them is the link's rate. Only a
sender that keeps the link busy learns it; small frames say nothing.

Pure: byte counts and monotonic times in, rates out.
"""

from __future__ import annotations

_LEAST_WAIT_S = 0.005
"""Minimum wait in seconds that shows full buffers; a shorter one may be the daemon's next read."""
_LONGEST_PAUSE_S = 0.02
"""Maximum pause in seconds between frames; after a longer one the buffers may have run empty."""
_LEAST_BYTES = 512 * 1024


class BandwidthMeter:
    """The rate at which one stream drains."""

    def __init__(self) -> None:
        self._sent_bytes = 0
        self._full: tuple[int, float] | None = None
        self._last_s = 0.0

    def begin(self, now_s: float) -> None:
        """A frame is about to be sent."""
        if now_s - self._last_s > _LONGEST_PAUSE_S:
            self._full = None

    def sent(self, num_bytes: int) -> None:
        """Add bytes that the kernel has accepted."""
        self._sent_bytes += num_bytes

    def end(self, now_s: float) -> None:
        """The frame has been accepted."""
        self._last_s = now_s

    def waited(self, began_s: float, ended_s: float) -> float | None:
        """The stream took no more from `began_s` to `ended_s`.

        Args:
            began_s: when the wait began; every buffer was full then, if it was a long one.
            ended_s: when the stream took more.

        Returns:
            Bytes per second since the last rate, or since the first wait; None if that is little.
        """
        if ended_s - began_s < _LEAST_WAIT_S:
            return None
        if self._full is None:
            self._full = self._sent_bytes, began_s
            return None
        drained, elapsed_s = self._sent_bytes - self._full[0], began_s - self._full[1]
        if drained < _LEAST_BYTES:
            return None
        self._full = self._sent_bytes, began_s
        return drained / elapsed_s
