"""Answers in the shapes of OpenAI: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from planetserve.gateway.sampling import TokenLogprob
from planetserve.gateway.text import Delta

Spell = Callable[[int], str]
"""How a token is written in log-probabilities."""


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Go on with what has come."""
        self.text += delta.text
        self.num_tokens += len(delta.tokens)
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


class Style(Protocol):
    """How one endpoint writes answers."""

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The response without a stream."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk in front of the first one of an answer."""
        ...

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The next chunk; None if there is nothing to tell."""
        ...

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk that tells what was used."""
        ...


def usage_of(num_prompt: int, num_answer: int) -> dict[str, Any]:
    """Tokens of a request."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }


class ChatStyle:
    """/v1/chat/completions.

    Args:
        model: its name.
        spell: for log-probabilities.
        shows_logprobs: whether they were asked for.
    """

    def __init__(self, model: str, spell: Spell, shows_logprobs: bool):
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._spell = spell
        self._shows_logprobs = shows_logprobs

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """As `Style`."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """As `Style`."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """As `Style`."""
        if not delta.text and delta.finish_reason is None and not delta.logprobs:
            return None
        written = {"content": delta.text} if delta.text or delta.logprobs else {}
        chunk = self._chunk(delta.index, written, delta.finish_reason)
        choice = chunk["choices"][0]
        choice["logprobs"] = self._logprobs(delta.logprobs)
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return chunk

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """As `Style`."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

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


class CompletionStyle:
    """/v1/completions.

    Args:
        model: its name.
        spell: for log-probabilities.
        shows_logprobs: whether they were asked for.
    """

    def __init__(self, model: str, spell: Spell, shows_logprobs: bool):
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._spell = spell
        self._shows_logprobs = shows_logprobs
        self._offsets: dict[int, int] = {}
        self.prompts: dict[int, Prompt] = {}
        """What to write in front of which answer."""

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
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
        return {**self._head, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """As `Style`."""
        prompt = self.prompts.get(index)
        if prompt is None:
            return None
        return self._chunk(index, prompt.text, self._logprobs(index, (), prompt))

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """As `Style`."""
        if not delta.text and delta.finish_reason is None and not delta.logprobs:
            return None
        logprobs = self._logprobs(delta.index, delta.logprobs, None)
        chunk = self._chunk(delta.index, delta.text, logprobs)
        choice = chunk["choices"][0]
        choice["finish_reason"], choice["stop_reason"] = delta.finish_reason, delta.stop_reason
        return chunk

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """As `Style`."""
        return {**self._head, "choices": [], "usage": usage}

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        return {**self._head, "choices": [choice]}

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
