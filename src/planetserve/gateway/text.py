"""One prompt and its answers: what was asked for, and what has come so far."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from planetserve.gateway.detokenize import StopStrings, TokenDecoder
from planetserve.gateway.sampling import RowSampling, Sampled, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A prompt, and how its `n` answers are made. Values have been checked."""

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    n: int = 1
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end an answer and are no part of it."""
    stop_ids: frozenset[int] = frozenset()
    """The same, asked for by the request."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    """How many most likely tokens to report for each token of the prompt; None: nothing."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one answer has got since the one before."""

    index: int
    """Which of the request's answers."""
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    """"stop" or "length" with the last one."""
    stop_reason: int | str | None = None
    """The stop string or token of the request that ended it."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens but the first."""

    prompt: int
    """Which of the request's prompts."""
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends with this."""

    error: Exception


Output = Delta | PromptLogprobs | Failed


class Outputs:
    """What the texts of one request have produced and nobody has taken yet, in order.

    No bound of its own: a text stops at its `max_tokens`.
    """

    def __init__(self) -> None:
        self._ready: deque[Output] = deque()
        self._came = asyncio.Event()

    def put(self, output: Output) -> None:
        self._ready.append(output)
        self._came.set()

    async def take(self, timeout_s: float | None = None) -> list[Output]:
        """All there is, at least one; nothing after `timeout_s`."""
        if not self._ready:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._came.wait()
            except TimeoutError:
                return []
        self._came.clear()
        taken = list(self._ready)
        self._ready.clear()
        return taken


@dataclass(slots=True)
class TextTimes:
    """When what happened, in seconds of the monotonic clock; 0 if it has not."""

    asked_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


class Row:
    """One answer as it grows."""

    def __init__(self, number: int, index: int, request: TextRequest, tokenizer: Tokenizer):
        params = request.sampling
        if params.seed is not None and number:
            params = dataclasses.replace(params, seed=params.seed + number)
        self.number = number
        """Its row in the session."""
        self.sampling = RowSampling(params, request.prompt_ids, request.eos_ids | request.stop_ids)
        self.num_held = len(request.prompt_ids)
        """Tokens that the servers hold of it."""
        self._index = index
        self._request = request
        self._decoder = TokenDecoder(tokenizer, request.prompt_ids, request.skip_special_tokens)
        self._stop = StopStrings(request.stop, request.include_stop)

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self.sampling.num_sampled

    def add(self, sampled: Sampled) -> Delta:
        """Take in the next token."""
        request, token = self._request, sampled.token
        reason: str | None = None
        stop_reason: int | str | None = None
        if token in request.eos_ids:
            reason = "stop"
        elif token in request.stop_ids:
            reason, stop_reason = "stop", token
        text, found = "", None
        if reason is None or request.include_stop:
            may_stop = self.num_tokens > request.sampling.min_tokens
            text, found = self._stop.add(self._decoder.add(token), may_stop=may_stop)
        if found is not None:
            reason, stop_reason = "stop", found
        elif reason is None and self.num_tokens >= request.max_tokens:
            reason = "length"
        if reason is not None and found is None:
            text += self._stop.flush()
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        return Delta(self._index, text, (token,), logprobs, reason, stop_reason)
