"""The text of an answer as parts of a message: content, reasoning, and calls of tools.

Which text is which, says the family's response template (`response_templates.py`), read by
transformers' own parser. A call that the request forces is JSON by a grammar and needs no template.
What a model writes may be anything: what cannot be parsed is content.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing import ResponseParser

_CALLS = "tool_calls"
_REASONING = ("reasoning_content", "reasoning", "thinking")
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What transformers' parser raises for what a model should not have written."""
_ID_CHARS = 9
"""Mistral's templates take no other length."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What one call of a tool has got; its name comes with the first."""

    index: int
    id: str
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """What a message has got since the one before."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __add__(self, other: MessageDelta) -> MessageDelta:
        return MessageDelta(
            self.content + other.content, self.reasoning + other.reasoning, self.calls + other.calls
        )


_NOTHING = MessageDelta()


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageFormat:
    """How the messages of one request are read."""

    template: Any = None
    """A `ResponseTemplate`; None: all text is content."""
    prompt: str = ""
    """The text that answers go on from, which may have begun a part."""
    tools: Sequence[dict[str, Any]] = ()
    forced: Literal["one", "many"] | None = None
    """Content is JSON: the arguments of the only tool, or a list of calls."""
    max_calls: int | None = None
    """Further ones are left out."""


class MessageReader:
    """Reads one answer as it comes."""

    def __init__(self, form: MessageFormat):
        self._form = form
        self._parser: ResponseParser | None = None
        self._region: str | None = None
        self._region_text = ""
        self._has_other = False
        self._held_space: str | None = None
        """White space that is content only if content follows it; None: also none came yet."""
        self._calls = _Calls(form)
        self.is_reasoning = False
        """Whether what comes next is reasoning."""
        if form.template is not None:
            # A message that is to be continued may be anything; then the rest of it is content.
            with contextlib.suppress(*_UNREADABLE):
                self._parser = ResponseParser(
                    form.template, prefix=form.prompt, tools=[*form.tools]
                )
                for event in self._parser.initial_events:
                    self._open_or_close(event)
        self.has_reasoned = self._has_other
        """Whether the prompt holds a part besides content already, open or not."""

    @property
    def ends_with_calls(self) -> bool:
        """Whether the model has chosen to call tools: naming one, the request has chosen itself."""
        return bool(self._calls.number) and self._form.forced != "one"

    def add(self, text: str) -> MessageDelta:
        """Take in more text."""
        if self._parser is None:
            return self._content(text)
        try:
            events = self._parser.feed(text)
        except _UNREADABLE:
            return self._give_up(text)
        return sum(map(self._take, events), _NOTHING)

    def finish(self) -> MessageDelta:
        """What is left when no more text comes."""
        found = _NOTHING
        if self._parser is not None:
            try:
                found = sum(map(self._take, self._parser.finalize()[1]), _NOTHING)
            except _UNREADABLE:
                found = self._give_up("")
        held, self._held_space = self._held_space, None
        if held and not self._has_other:
            found += MessageDelta(content=held)
        return found + self._calls.finish()

    def _give_up(self, text: str) -> MessageDelta:
        """A region is not what its template promises: it and all that follows is content."""
        parser, self._parser = self._parser, None
        rest = text
        if parser is not None and self._region not in (None, "content"):
            # What was not shown: the region as it was written, and what the parser had not read.
            rest = self._region_text + text
        self._region, self.is_reasoning = None, False
        return self._content(rest)

    def _take(self, event: dict[str, Any]) -> MessageDelta:
        kind, field = event["type"], event["field"]
        if kind != "region_chunk":
            text = self._region_text
            self._open_or_close(event)
            if kind != "region_close" or field != _CALLS:
                return _NOTHING
            try:
                return self._calls.add(event["value"])
            except _UNREADABLE:
                return self._content(text)
        if field == "content":
            return self._content(event["text"])
        if field in _REASONING:
            return self._spaced(event["text"], is_content=False)
        self._region_text += event["text"]
        return _NOTHING

    def _open_or_close(self, event: dict[str, Any]) -> None:
        kind, field = event["type"], event["field"]
        if kind == "region_chunk":
            return
        is_open = kind == "region_open"
        if field != "content":
            self._has_other = True
            self._held_space = None
            self.is_reasoning = is_open and field in _REASONING
        self._region = field if is_open else None
        self._region_text = ""

    def _content(self, text: str) -> MessageDelta:
        if self._form.forced:
            return self._calls.add_json(text)
        return self._spaced(text, is_content=True)

    def _spaced(self, text: str, *, is_content: bool) -> MessageDelta:
        """Without the white space that borders on another part."""
        begins = self._held_space is None
        if begins and (self._has_other or not is_content):
            text = text.lstrip()
            if not text:
                return _NOTHING
        text = (self._held_space or "") + text
        shown = text.rstrip()
        self._held_space = text[len(shown) :]
        return MessageDelta(content=shown) if is_content else MessageDelta(reasoning=shown)


class _Calls:
    """The calls of one message."""

    def __init__(self, form: MessageFormat):
        self._form = form
        self.number = 0
        self._id = ""
        self._element = ""
        self._depth = 0
        self._in_string = self._escaped = False

    def add(self, value: Any) -> MessageDelta:
        """One parsed call, or a list of them.

        Raises:
            ValueError: it is none.
        """
        if isinstance(value, list):
            found = [call for one in value for call in self.add(one).calls]
            return MessageDelta(calls=tuple(found))
        function = value.get("function", value)
        name, arguments = function["name"], function.get("arguments")
        if arguments is None:
            arguments = function.get("parameters", {})
        if not isinstance(name, str):
            raise ValueError("a call without a name")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return self._call(name, arguments)

    def add_json(self, text: str) -> MessageDelta:
        """Text of a forced call: arguments as they come, or elements of a list once they are
        whole."""
        if self._form.forced == "one":
            if not self.number:
                return self._call(self._form.tools[0]["function"]["name"], text)
            return MessageDelta(calls=(CallDelta(0, self._id, None, text),)) if text else _NOTHING
        found = _NOTHING
        for char in text:
            if self._grow(char):
                element, self._element = self._element, ""
                try:
                    found += self.add(json.loads(element))
                except _UNREADABLE:  # nested too deeply
                    found += MessageDelta(content=element)
        return found

    def finish(self) -> MessageDelta:
        """An element that the limit of tokens has cut off is content: it is no call."""
        cut, self._element = self._element, ""
        return MessageDelta(content=cut)

    def _grow(self, char: str) -> bool:
        """Whether an element of the list is whole with this character."""
        if self._depth > 1:
            self._element += char
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "[{":
            self._depth += 1
            if self._depth == 2:
                self._element = char
        elif char in "]}":
            self._depth -= 1
            return self._depth == 1
        return False

    def _call(self, name: str, arguments: str) -> MessageDelta:
        most = self._form.max_calls
        if most is not None and self.number >= most:
            return _NOTHING
        self._id = uuid.uuid4().hex[:_ID_CHARS]
        self.number += 1
        return MessageDelta(calls=(CallDelta(self.number - 1, self._id, name, arguments),))
