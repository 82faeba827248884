"""/v1/messages, Anthropic's API, which coding agents speak. A request becomes a chat."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from planetserve.gateway.answers import Answer, Event, Usage
from planetserve.gateway.chain_timer import ChainReport
from planetserve.gateway.errors import RequestError, anthropic_body, body_of
from planetserve.gateway.message_blocks import Block, Blocks, Change
from planetserve.gateway.protocol import ChatRequest, chat_request, refuse_unsupported
from planetserve.gateway.text import Delta

_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "container": (),
    "mcp_servers": (),
    "context_management": (),
    "prefill": (),
}
_SAMPLING = ("model", "stream", "temperature", "top_p", "top_k")
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class TurnBlock(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")

    type: str


class Turn(BaseModel):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[TurnBlock]


class ToolChoice(BaseModel):
    """Whether and which tools must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class AnthropicTool(BaseModel):
    """A function that the model may ask for."""

    model_config = ConfigDict(extra="allow")

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class CountRequest(BaseModel):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: str | list[TurnBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def as_chat(self) -> ChatRequest:
        """The chat that asks for the same.

        Raises:
            RequestError: something in it cannot be obeyed.
        """
        refuse_unsupported(self.model_extra or {}, _UNSUPPORTED)
        given = self.model_dump(exclude_none=True)
        chat: dict[str, Any] = {name: given[name] for name in _SAMPLING if name in given}
        chat["max_completion_tokens"] = given.get("max_tokens")
        chat["stop"] = given.get("stop_sequences") or None
        if self.system:
            chat["messages"] = [{"role": "system", "content": _text(self.system, "system")}]
        else:
            chat["messages"] = []
        for turn in self.messages:
            chat["messages"] += _messages(turn)
        # An answer that has begun goes on.
        if self.messages[-1].role == "assistant":
            chat |= {"continue_final_message": True, "add_generation_prompt": False}
        chat["tools"] = [_tool(tool) for tool in self.tools or []]
        if self.tool_choice is not None:
            chat |= _choice(self.tool_choice)
        if self.thinking is not None:
            thinks = self.thinking.get("type") != "disabled"
            chat["chat_template_kwargs"] = {"enable_thinking": thinks}
        form = (self.output_config or {}).get("format")
        if isinstance(form, dict):
            chat["response_format"] = {"type": form.get("type"), "json_schema": form}
        return chat_request(chat)


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    stop_sequences: list[str] | None = None


class MessagesStyle:
    """As `Style`.

    Args:
        model: its name.
    """

    names_events = True
    end = b""

    def __init__(self, model: str):
        self._head: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._blocks = Blocks()

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """As `Style`."""
        content = [_content(block) for block in Blocks.of(answers[0]).done]
        return {**self._head, "content": content, **_ending(answers[0]), "usage": _usage(usage)}

    def opening(self, index: int, usage: Usage) -> list[Event]:
        """As `Style`."""
        begun = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": {**begun, "usage": _usage(usage)}}]

    def chunk(self, delta: Delta, usage: Usage) -> list[Event]:
        """As `Style`."""
        return [_changed(change) for change in self._blocks.add(delta.as_message)]

    def closing(self, answers: Sequence[Answer], usage: Usage) -> list[Event]:
        """As `Style`."""
        return [
            *map(_changed, self._blocks.end()),
            {"type": "message_delta", "delta": _ending(answers[0]), "usage": _usage(usage)},
            {"type": "message_stop"},
        ]

    def chain(self, report: ChainReport) -> list[Event]:
        """As `Style`: this API has no place for it."""
        return []

    def failure(self, error: Exception) -> list[Event]:
        """As `Style`."""
        return [anthropic_body(body_of(error))]


def _ending(answer: Answer) -> dict[str, Any]:
    if isinstance(answer.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_reason}
    reason = _STOP_REASONS.get(answer.finish_reason or "", "end_turn")
    if answer.calls and reason == "end_turn":
        reason = "tool_use"  # also of a tool that the request has named
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "output_tokens": usage.num_answer,
        "cache_read_input_tokens": usage.num_cached,
        "cache_creation_input_tokens": 0,
    }


def _content(block: Block) -> dict[str, Any]:
    """A block that is whole."""
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    try:
        given = json.loads(block.text)
    except ValueError:  # cut off by the limit of tokens
        given = {}
    given = given if isinstance(given, dict) else {}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": given}


def _changed(change: Change) -> Event:
    """The event of what has happened to a block."""
    what, block, text = change
    if what == "open":
        empty = Block(block.index, block.kind, "", block.id, block.name)
        return {
            "type": "content_block_start",
            "index": block.index,
            "content_block": _content(empty),
        }
    if what == "close":
        return {"type": "content_block_stop", "index": block.index}
    delta = {
        "reasoning": {"type": "thinking_delta", "thinking": text},
        "text": {"type": "text_delta", "text": text},
        "call": {"type": "input_json_delta", "partial_json": text},
    }[block.kind]
    return {"type": "content_block_delta", "index": block.index, "delta": delta}


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(f"the tool {tool.type[:50]!r} is not possible here", "tools")
    function = {
        "name": tool.name, "description": tool.description, "parameters": tool.input_schema,
    }  # fmt: skip
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    found: Any = {"any": "required"}.get(choice.type, choice.type)
    if choice.type == "tool":
        found = {"type": "function", "function": {"name": choice.name}}
    return {
        "tool_choice": found,
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }


def _messages(turn: Turn) -> list[dict[str, Any]]:
    """The messages of a chat that say the same: results of tools are messages of their own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    message: dict[str, Any] = {"role": turn.role, "content": ""}
    texts = []
    for block in turn.content:
        fields = block.model_extra or {}
        if block.type == "tool_result" and turn.role == "user":
            results.append(
                {
                    "role": "tool",
                    "tool_call_id": fields.get("tool_use_id"),
                    "content": _text(fields.get("content"), "messages"),
                }
            )
        elif block.type == "tool_use" and turn.role == "assistant":
            function = {"name": fields.get("name"), "arguments": fields.get("input") or {}}
            call = {"id": fields.get("id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif block.type == "thinking" and turn.role == "assistant":
            message["reasoning_content"] = fields.get("thinking")
        elif block.type != "redacted_thinking":
            texts.append(_text([block], "messages"))
    message["content"] = "\n".join(texts)
    has_more = bool(texts) or len(message) > 2
    return [*results, message] if has_more or not results else results


def _text(content: object, param: str) -> str:
    """The text of some blocks.

    Raises:
        RequestError: one is something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for one in content if isinstance(content, list) else [content]:
        block = one.model_dump() if isinstance(one, TurnBlock) else one
        found = block if isinstance(block, dict) else {}
        if found.get("type") != "text" or not isinstance(found.get("text"), str):
            kind = str(found.get("type"))[:50]
            raise RequestError(f"content of type {kind!r} is not supported; send text", param)
        texts.append(found["text"])
    return "\n".join(texts)
