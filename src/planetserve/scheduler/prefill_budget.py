"""How many prompt tokens a batch may hold, so that sessions that decode are hardly slowed down.

A prompt is computed in chunks next to other sessions' decode steps (Sarathi's stall-free batching,
OSDI 2024, section 4). The time of a batch depends on the machine and the model, so it is measured:
batches of decode steps alone give the base time, the others the time per additional token. From
both follows how many prompt tokens make a batch `slowdown` times as long. While no session decodes,
a chunk may be as large as a batch.

If many sessions wait for their first token and few decode, the few may be slowed down more: the
time of all sessions counts the same.

Pure: times come in as arguments.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection

from planetserve.errors import ConfigError

MIN_TOKENS = 8
MOST_SLOWDOWN = 4.0
"""Maximum time of a batch as a multiple of decode steps alone, however many prompts wait."""

_FIRST_TOKENS = 32
_DECODE_BATCHES = 5
"""Number of batches whose median is the time of decode steps alone."""
_RENEW_AFTER = 64
"""Number of batches with prompt tokens after which one without them is run, to measure decode steps
again."""
_TOKEN_WEIGHT = 0.2
_LEAST_TOKENS_MORE = 4
_QUIET_S = 0.25
_QUIET_BATCHES = 4


class PrefillBudget:
    """Decides on the prompt tokens of one engine's batches.

    Args:
        max_tokens: of a batch.
        slowdown: how much longer than decode steps alone a batch with prompt tokens may take.
    """

    def __init__(self, max_tokens: int, slowdown: float):
        if max_tokens < 1 or not slowdown > 1:
            raise ConfigError(
                f"prompts cannot be computed with max_tokens={max_tokens} and slowdown={slowdown}; "
                "give at least one token and a slowdown above 1"
            )
        self._max_tokens = max_tokens
        self._slowdown = slowdown
        self._decode_batches: deque[tuple[float, int]] = deque(maxlen=_DECODE_BATCHES)
        self._token_s: float | None = None
        self._num_mixed = 0
        self._last_decode_s: dict[bytes, float] = {}

    def tokens(self, now_s: float, prefilling: Collection[bytes], num_decode_tokens: int) -> int:
        """Prompt tokens that the next batch may hold; 0 if it should be of decode steps alone.

        Args:
            now_s: monotonic time.
            prefilling: sessions that have a prompt to compute, and so no text that could stall.
            num_decode_tokens: of the decode steps that are ready for the batch.
        """
        # Between two of its tokens a session is with its client: decoding has not ended yet.
        decode_s, usual_tokens = self._usual
        quiet_s = max(_QUIET_S, _QUIET_BATCHES * decode_s)
        num_decoding = sum(
            now_s - last_s <= quiet_s and session_id not in prefilling
            for session_id, last_s in self._last_decode_s.items()
        )
        if not num_decoding:
            return self._max_tokens
        is_known = self._decode_batches and self._num_mixed < _RENEW_AFTER
        if num_decode_tokens and not is_known:
            return 0
        least = min(MIN_TOKENS, self._max_tokens)
        if self._token_s is None or not self._decode_batches:
            return max(least, min(_FIRST_TOKENS, self._max_tokens))
        fair = min(1 + len(prefilling) / num_decoding, MOST_SLOWDOWN)
        # The time of the decode steps that are ready, or of the usual ones if none is.
        steps = num_decode_tokens or usual_tokens
        steps_s = max(decode_s + self._token_s * (steps - usual_tokens), 0.0)
        room_s = max(self._slowdown, fair) * steps_s - decode_s
        tokens = usual_tokens + room_s / self._token_s - num_decode_tokens
        return int(min(max(tokens, least), self._max_tokens))

    def forget(self, session_id: bytes) -> None:
        """The session has ended."""
        self._last_decode_s.pop(session_id, None)
        if not self._last_decode_s:
            self._decode_batches.clear()  # the next sessions may use other blocks

    def record(
        self,
        decoding: Collection[bytes],
        num_decode_tokens: int,
        num_prefill_tokens: int,
        work_s: float,
        now_s: float,
    ) -> None:
        """Record a batch that ran until `now_s`.

        Args:
            decoding: sessions of its decode steps.
            num_decode_tokens: theirs.
            num_prefill_tokens: its other tokens.
            work_s: the time it took, or a measure of it that other programs do not disturb.
            now_s: monotonic time.
        """
        self._last_decode_s.update(dict.fromkeys(decoding, now_s))
        if not num_prefill_tokens:
            self._decode_batches.append((work_s, num_decode_tokens))
            self._num_mixed = 0
            return
        self._num_mixed += 1
        decode_s, usual_tokens = self._usual
        more = num_decode_tokens + num_prefill_tokens - usual_tokens
        if not self._decode_batches or more < _LEAST_TOKENS_MORE:
            return
        token_s = max((work_s - decode_s) / more, 1e-9)
        known_s = token_s if self._token_s is None else self._token_s
        self._token_s = known_s + _TOKEN_WEIGHT * (token_s - known_s)

    @property
    def _usual(self) -> tuple[float, float]:
        """Time and tokens of a batch of decode steps alone; 0 if none has run."""
        if not self._decode_batches:
            return 0.0, 0.0
        times_s, tokens = zip(*self._decode_batches, strict=True)
        return statistics.median(times_s), statistics.mean(tokens)
