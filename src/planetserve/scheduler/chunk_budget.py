"""How many prompt tokens a batch may take along, so that those who decode hardly notice.

A prompt is computed in chunks next to other sessions' decode steps (Sarathi's stall-free batching,
OSDI 2024, section 4). What a chunk costs depends on the machine, the model and the batch, so the
budget is steered by what batches took: it shrinks in proportion when one took longer than
`slowdown` times a batch of decode steps alone, and grows slowly otherwise. While nobody decodes, a
chunk may be as large as a batch.

Pure: times come in as arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Container

from planetserve.errors import ConfigError

MIN_TOKENS = 8
_FIRST_TOKENS = 32
_GROWTH = 1.1
_WEIGHT = 0.2
_QUIET_S = 0.25
_QUIET_BATCHES = 4


class ChunkBudget:
    """Steers the prompt tokens of one engine's batches.

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
        self._tokens = float(min(_FIRST_TOKENS, max_tokens))
        self._decode_s: float | None = None
        self._last_decode_s: dict[bytes, float] = {}

    def tokens(self, now_s: float, prefilling: Container[bytes]) -> int:
        """Prompt tokens that the next batch may hold.

        Args:
            now_s: monotonic time.
            prefilling: sessions that have a prompt to compute, and so no text that could stall.
        """
        # Between two of its tokens a session is with its client: decoding has not ended yet.
        quiet_s = max(_QUIET_S, _QUIET_BATCHES * (self._decode_s or 0.0))
        for session_id, last_s in self._last_decode_s.items():
            if now_s - last_s <= quiet_s and session_id not in prefilling:
                return int(self._tokens)
        return self._max_tokens

    def forget(self, session_id: bytes) -> None:
        """The session has ended."""
        self._last_decode_s.pop(session_id, None)

    def record(
        self, decoding: Collection[bytes], num_prefill_tokens: int, elapsed_s: float, now_s: float
    ) -> None:
        """Take a batch into account that ran for `elapsed_s` until `now_s`.

        Args:
            decoding: sessions of its decode steps.
            num_prefill_tokens: its other tokens.
        """
        if not decoding:
            return
        self._last_decode_s.update(dict.fromkeys(decoding, now_s))
        if not num_prefill_tokens:
            known_s = self._decode_s or elapsed_s
            self._decode_s = known_s + _WEIGHT * (elapsed_s - known_s)
            return
        if self._decode_s is None:
            return
        allowed_s = self._slowdown * self._decode_s
        if elapsed_s > allowed_s:
            tokens = min(self._tokens, num_prefill_tokens) * allowed_s / elapsed_s
        elif num_prefill_tokens >= int(self._tokens):
            tokens = self._tokens * _GROWTH
        else:
            return
        self._tokens = min(max(tokens, min(MIN_TOKENS, self._max_tokens)), self._max_tokens)
