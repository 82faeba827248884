"""One prompt and its answers: what was asked for, and what has come so far."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from llguidance import LLMatcher
from tokenizers import Tokenizer

from planetserve.errors import PlanetServeError
from planetserve.gateway.chain_timer import ChainReport
from planetserve.gateway.constraints import Constraint
from planetserve.gateway.detokenize import StopStrings, TokenDecoder
from planetserve.gateway.messages import MessageDelta, MessageFormat, MessageReader
from planetserve.gateway.sampling import RowSampling, Sampled, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A prompt, and how its `n` answers are made. Values have been checked."""

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    reserved_tokens: int | None = None
    """Tokens of an answer that servers are asked to promise; None: `max_tokens`."""
    n: int = 1
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end an answer and are no part of it."""
    stop_ids: frozenset[int] = frozenset()
    """The same, asked for by the request."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    kept_ids: frozenset[int] = frozenset()
    """Special tokens that are written all the same: they tell the parts of a message apart."""
    form: MessageFormat | None = None
    """How a message is read; None: all text is content."""
    grammar: LLMatcher | None = None
    """What every answer must follow."""
    reasoning_id: int | None = None
    """Token that begins reasoning, which may come before what the grammar binds."""
    owner: str = ""
    """Name of the API key. Only its own texts may continue a session that is kept warm."""
    prompt_logprobs: int | None = None
    """How many most likely tokens to report for each token of the prompt; None: nothing."""

    reports_chain: bool = False
    """Whether the answers come with `ChainReport`s."""

    @property
    def lease_tokens(self) -> int:
        """What servers are asked to promise to each row."""
        return len(self.prompt_ids) + (self.reserved_tokens or self.max_tokens)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one answer has got since the one before."""

    index: int
    """Which of the request's answers."""
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    """"stop", "length" or "tool_calls" with the last one."""
    stop_reason: int | str | None = None
    """The stop string or token of the request that ended it."""
    message: MessageDelta | None = None
    """What the text is of a message, if it is read as one."""
    num_reasoning: int = 0
    """How many of the tokens are reasoning."""
    num_cached: int = 0
    """With the first one: how many tokens of the prompt servers still held."""

    @property
    def as_message(self) -> MessageDelta:
        """Its part of a message."""
        return MessageDelta(content=self.text) if self.message is None else self.message


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


Output = Delta | PromptLogprobs | ChainReport | Failed


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

    def __init__(
        self,
        number: int,
        index: int,
        request: TextRequest,
        tokenizer: Tokenizer,
        num_cached: int = 0,
    ):
        params = request.sampling
        if params.seed is not None and number:
            params = dataclasses.replace(params, seed=params.seed + number)
        self.number = number
        """Its row in the session."""
        self._reader = None if request.form is None else MessageReader(request.form)
        self.sampling = RowSampling(
            params,
            request.prompt_ids,
            request.eos_ids | request.stop_ids,
            _constraint(request, self._reader),
        )
        self.num_held = len(request.prompt_ids)
        """Tokens that the servers hold of it."""
        self._index = index
        self._request = request
        self._num_tokens = 0
        self._num_cached = num_cached
        self._decoder = TokenDecoder(
            tokenizer, request.prompt_ids, request.skip_special_tokens, request.kept_ids
        )
        self._stop = StopStrings(request.stop, request.include_stop)

    def add(self, sampled: Sampled) -> Delta:
        """Take in what was chosen next.

        Raises:
            RequestError: the grammar cannot be followed any further.
            PlanetServeError: the logits were no numbers.
        """
        if not sampled.is_finite:
            raise PlanetServeError(
                "the head has computed logits that are not finite; serve the model with another "
                "--dtype"
            )
        reader = self._reader
        num_cached, self._num_cached = self._num_cached, 0  # told once
        text, message, num_tokens, num_reasoning = "", MessageDelta(), 0, 0
        for token in sampled.tokens:
            num_reasoning += reader is not None and reader.is_reasoning
            num_tokens += 1
            new_text, reason, stop_reason = self._add_token(token)
            is_last = num_tokens == len(sampled.tokens)
            if reason != "stop" and is_last and self._is_done():
                reason = "stop"
                new_text += self._stop.flush()
            text += new_text
            if reader is not None:
                message += reader.add(new_text)
                if reason is not None:
                    message += reader.finish()
                    if reason == "stop" and reader.ends_with_calls:
                        reason = "tool_calls"
            if reason is not None:
                break
        if self.sampling.constraint is not None and reader is not None:
            self.sampling.constraint.is_active = not reader.is_reasoning
        return Delta(
            self._index,
            text,
            sampled.tokens[:num_tokens],
            () if sampled.logprob is None else (sampled.logprob,),
            reason,
            stop_reason,
            None if reader is None else message,
            num_reasoning,
            num_cached,
        )

    def _add_token(self, token: int) -> tuple[str, str | None, int | str | None]:
        """The text that can be passed on, and why it ends with this token, if it does."""
        request = self._request
        self._num_tokens += 1
        reason: str | None = None
        stop_reason: int | str | None = None
        if token in request.eos_ids:
            reason = "stop"
        elif token in request.stop_ids:
            reason, stop_reason = "stop", token
        text, found = "", None
        if reason is None or request.include_stop:
            may_stop = self._num_tokens > request.sampling.min_tokens
            text, found = self._stop.add(self._decoder.add(token), may_stop=may_stop)
        if found is not None:
            reason, stop_reason = "stop", found
        elif reason is None and self._num_tokens >= request.max_tokens:
            reason = "length"
        if reason is not None and found is None:
            text += self._stop.flush()
        return text, reason, stop_reason

    def _is_done(self) -> bool:
        """Whether the grammar allows nothing more."""
        constraint = self.sampling.constraint
        if constraint is None:
            return False
        constraint.check()
        return constraint.is_done


def _constraint(request: TextRequest, reader: MessageReader | None) -> Constraint | None:
    """A new answer's way through the grammar of its request."""
    if request.grammar is None:
        return None
    may_reason = reader is not None and not reader.has_reasoned
    constraint = Constraint(
        request.grammar.deep_copy(), request.reasoning_id if may_reason else None
    )
    constraint.is_active = reader is None or not reader.is_reasoning
    return constraint
