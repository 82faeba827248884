"""Answers in the shapes of OpenAI: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from planetserve.gateway.chain_timer import ChainReport
from planetserve.gateway.errors import body_of
from planetserve.gateway.messages import CallDelta
from planetserve.gateway.protocol import ChatRequest, CompletionRequest, StreamOptions
from planetserve.gateway.sampling import TokenLogprob
from planetserve.gateway.text import Delta

Spell = Callable[[int], str]
"""How a token is written in log-probabilities."""


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come."""

    text: str = ""
    """As the model wrote it."""
    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    num_tokens: int = 0
    num_reasoning: int = 0
    num_cached: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Go on with what has come."""
        self.text += delta.text
        message = delta.as_message
        self.content += message.content
        self.reasoning += message.reasoning
        for call in message.calls:
            if call.index < len(self.calls):
                known = self.calls[call.index]
                call = replace(known, arguments=known.arguments + call.arguments)
                self.calls[call.index] = call
            else:
                self.calls.append(call)
        self.num_tokens += len(delta.tokens)
        self.num_reasoning += delta.num_reasoning
        self.num_cached += delta.num_cached
        self.logprobs += delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is shown in front of its answers."""

    text: str
    tokens: Sequence[int] = ()
    """Only with log-probabilities."""
    logprobs: Sequence[TokenLogprob] = ()
    """Of its tokens but the first."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request."""

    num_prompt: int
    num_answer: int
    num_reasoning: int = 0
    """Of the answer's."""
    num_cached: int = 0
    """Of the prompt's, which servers still held."""

    def as_openai(self) -> dict[str, Any]:
        """As chats and completions tell it."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_answer,
            "total_tokens": self.num_prompt + self.num_answer,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning},
        }


Event = dict[str, Any]
"""One event of a stream."""


class Style(Protocol):
    """How one endpoint writes answers."""

    names_events: bool
    """Whether a stream's events are named by their `type`."""
    end: bytes
    """What a stream ends with."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The response without a stream."""
        ...

    def opening(self, index: int, usage: Usage) -> list[Event]:
        """In front of the first chunk of an answer."""
        ...

    def chunk(self, delta: Delta, usage: Usage) -> list[Event]:
        """What has come next."""
        ...

    def chain(self, report: ChainReport) -> list[Event]:
        """Between chunks: the servers at work."""
        ...

    def closing(self, answers: Sequence[Answer], usage: Usage) -> list[Event]:
        """After the last chunk."""
        ...

    def failure(self, error: Exception) -> list[Event]:
        """Instead of it, when a text has failed."""
        ...


class OpenAIStyle:
    """What chats and completions have in common.

    Args:
        head: in front of every chunk.
        spell: for log-probabilities.
        shows_logprobs: whether they were asked for.
        options: what a stream contains besides the answer.
    """

    names_events = False
    end = b"data: [DONE]\n\n"

    def __init__(
        self, head: Event, spell: Spell, shows_logprobs: bool, options: StreamOptions | None
    ):
        self._head = {"id": f"{head.pop('prefix')}-{uuid.uuid4().hex}", **head}
        self._head["created"] = int(time.time())
        self._spell = spell
        self._shows_logprobs = shows_logprobs
        self._options = options or StreamOptions()

    def chain(self, report: ChainReport) -> list[Event]:
        """As `Style`."""
        return [{**self._head, "choices": [], "chain": report.model_dump()}]

    def closing(self, answers: Sequence[Answer], usage: Usage) -> list[Event]:
        """As `Style`."""
        if not self._options.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": usage.as_openai()}]

    def failure(self, error: Exception) -> list[Event]:
        """As `Style`."""
        return [body_of(error)]

    def _told(self, choice: dict[str, Any], usage: Usage) -> list[Event]:
        """A chunk with one choice."""
        chunk = {**self._head, "choices": [choice]}
        if self._options.continuous_usage_stats:
            chunk["usage"] = usage.as_openai()
        elif self._options.include_usage:
            chunk["usage"] = None
        return [chunk]


class ChatStyle(OpenAIStyle):
    """/v1/chat/completions.

    Args:
        model: its name.
        body: the request.
        spell: for log-probabilities.
    """

    def __init__(self, model: str, body: ChatRequest, spell: Spell):
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = {"prefix": "chatcmpl", "object": kind, "model": model}
        super().__init__(head, spell, bool(body.logprobs), body.stream_options)
        self._shows_reasoning = body.include_reasoning

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """As `Style`."""
        choices = [
            {
                "index": index,
                "message": self._message(answer),
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "choices": choices, "usage": usage.as_openai()}

    def opening(self, index: int, usage: Usage) -> list[Event]:
        """As `Style`."""
        return self._told(self._choice(index, {"role": "assistant", "content": ""}), usage)

    def chunk(self, delta: Delta, usage: Usage) -> list[Event]:
        """As `Style`."""
        message = delta.as_message
        written: dict[str, Any] = {}
        if message.reasoning and self._shows_reasoning:
            written["reasoning_content"] = message.reasoning
        if message.content:
            written["content"] = message.content
        if message.calls:
            written["tool_calls"] = [_call_chunk(call) for call in message.calls]
        if not written and delta.finish_reason is None and not delta.logprobs:
            return []
        choice = self._choice(delta.index, written, delta.finish_reason)
        choice["logprobs"] = self._logprobs(delta.logprobs)
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return self._told(choice, usage)

    def _message(self, answer: Answer) -> dict[str, Any]:
        found: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning and self._shows_reasoning:
            found["reasoning_content"] = answer.reasoning
        if answer.calls:
            found["content"] = answer.content or None
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return found

    @staticmethod
    def _choice(
        index: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._shows_logprobs:
            return None
        content = [
            {
                **self._entry(one.token, one.logprob),
                "top_logprobs": [self._entry(*pair) for pair in one.top],
            }
            for one in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionStyle(OpenAIStyle):
    """/v1/completions.

    Args:
        model: its name.
        body: the request.
        spell: for log-probabilities.
    """

    def __init__(self, model: str, body: CompletionRequest, spell: Spell):
        head = {"prefix": "cmpl", "object": "text_completion", "model": model}
        super().__init__(head, spell, body.logprobs is not None, body.stream_options)
        self._offsets: dict[int, int] = {}
        self.prompts: dict[int, Prompt] = {}
        """What to write in front of which answer."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """As `Style`."""
        choices = []
        for index, answer in enumerate(answers):
            prompt = self.prompts.get(index)
            choices.append(
                {
                    "index": index,
                    "text": (prompt.text if prompt else "") + answer.text,
                    "logprobs": self._logprobs(index, answer.logprobs, prompt),
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
            )
        return {**self._head, "choices": choices, "usage": usage.as_openai()}

    def opening(self, index: int, usage: Usage) -> list[Event]:
        """As `Style`."""
        prompt = self.prompts.get(index)
        if prompt is None:
            return []
        logprobs = self._logprobs(index, (), prompt)
        return self._told(self._choice(index, prompt.text, logprobs), usage)

    def chunk(self, delta: Delta, usage: Usage) -> list[Event]:
        """As `Style`."""
        if not delta.text and delta.finish_reason is None and not delta.logprobs:
            return []
        logprobs = self._logprobs(delta.index, delta.logprobs, None)
        choice = self._choice(delta.index, delta.text, logprobs)
        choice["finish_reason"], choice["stop_reason"] = delta.finish_reason, delta.stop_reason
        return self._told(choice, usage)

    @staticmethod
    def _choice(index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(
        self, index: int, logprobs: Sequence[TokenLogprob], prompt: Prompt | None
    ) -> dict[str, Any] | None:
        if not self._shows_logprobs:
            return None
        found: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        if prompt is not None and prompt.tokens:
            self._append(found, index, prompt.tokens[0], None)
            for one in prompt.logprobs:
                self._append(found, index, one.token, one)
        for one in logprobs:
            self._append(found, index, one.token, one)
        return found

    def _append(
        self, found: dict[str, list[Any]], index: int, token: int, one: TokenLogprob | None
    ) -> None:
        text = self._spell(token)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(text)
        found["tokens"].append(text)
        found["text_offset"].append(offset)
        found["token_logprobs"].append(None if one is None else one.logprob)
        top = None
        if one is not None:
            top = dict[str, float]()
            for other, logprob in (*one.top, (one.token, one.logprob)):
                top.setdefault(self._spell(other), logprob)
        found["top_logprobs"].append(top)


def _call_chunk(call: CallDelta) -> dict[str, Any]:
    """What a stream tells of a call: its name first."""
    function = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, **function},
    }
