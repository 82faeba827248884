"""/v1/responses, as the Open Responses specification has it, without state on this side.

A request becomes a chat, and the chat's answer a response whose output is a list of items.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from planetserve.gateway.answers import Answer, Event, Usage
from planetserve.gateway.chain_timer import ChainReport
from planetserve.gateway.errors import RequestError, body_of
from planetserve.gateway.message_blocks import Block, Blocks, Change
from planetserve.gateway.protocol import ChatRequest, chat_request, refuse_unsupported
from planetserve.gateway.text import Delta

_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (),
    "prompt": (),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "max_tool_calls": (),
    "moderation": (),
}
_SAMPLING = (
    "model", "stream", "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k",
    "min_p", "seed", "stop", "repetition_penalty", "ignore_eos", "chat_template_kwargs",
    "parallel_tool_calls", "structured_outputs",
)  # fmt: skip
_ECHOED: Mapping[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "temperature": 1.0, "top_p": 1.0,
    "tools": [], "tool_choice": "auto", "user": None, "safety_identifier": None,
    "prompt_cache_key": None, "reasoning": {"effort": None, "summary": None},
    "text": {"format": {"type": "text"}},
}  # fmt: skip
"""What a response repeats of its request, and what it says where that has nothing."""
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


class InputItem(BaseModel):
    """A message, a call of a tool, its result, or reasoning."""

    model_config = ConfigDict(extra="allow")

    type: str = "message"


class ResponsesRequest(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: str | list[InputItem]
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    def as_chat(self) -> ChatRequest:
        """The chat that asks for the same.

        Raises:
            RequestError: something in it cannot be obeyed.
        """
        refuse_unsupported(self.model_extra or {}, _UNSUPPORTED)
        given = self.model_dump(exclude_none=True)
        chat: dict[str, Any] = {name: given[name] for name in _SAMPLING if name in given}
        chat["messages"] = _messages(self)
        chat["max_completion_tokens"] = self.max_output_tokens
        chat["tools"] = [_tool(tool) for tool in self.tools or []]
        chat["tool_choice"] = self.tool_choice
        if isinstance(self.tool_choice, dict):
            if self.tool_choice.get("type") != "function":
                raise RequestError("tool_choice can name a function only", "tool_choice")
            chosen = {"name": self.tool_choice.get("name")}
            chat["tool_choice"] = {"type": "function", "function": chosen}
        chat["reasoning_effort"] = (self.reasoning or {}).get("effort")
        form = (self.text or {}).get("format") or {}
        if not isinstance(form, dict):
            raise RequestError("text.format is no object", "text")
        if form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": form}
        chat["response_format"] = form or None
        return chat_request(chat)


class ResponsesStyle:
    """As `Style`.

    Args:
        model: its name.
        body: the request.
    """

    names_events = True
    end = b"data: [DONE]\n\n"

    def __init__(self, model: str, body: ResponsesRequest):
        given = body.model_dump(exclude_none=True)
        echoed = {name: given.get(name, default) for name, default in _ECHOED.items()}
        echoed["text"] = {**_ECHOED["text"], **echoed["text"]}
        echoed["reasoning"] = {**_ECHOED["reasoning"], **echoed["reasoning"]}
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **echoed,
            "background": False,
            "max_tool_calls": None,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "top_logprobs": 0,
            "truncation": "disabled",
        }
        self._blocks = Blocks()
        self._ids: dict[int, str] = {}
        self._number = 0

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """As `Style`."""
        return self._response(answers[0].finish_reason, Blocks.of(answers[0]).done, usage)

    def opening(self, index: int, usage: Usage) -> list[Event]:
        """As `Style`."""
        begun = self._told("in_progress", [], None)
        return [
            self._event("created", response=begun),
            self._event("in_progress", response=begun),
        ]

    def chunk(self, delta: Delta, usage: Usage) -> list[Event]:
        """As `Style`."""
        changes = self._blocks.add(delta.as_message)
        return [event for change in changes for event in self._changed(change)]

    def closing(self, answers: Sequence[Answer], usage: Usage) -> list[Event]:
        """As `Style`."""
        events = [event for change in self._blocks.end() for event in self._changed(change)]
        last = self._response(answers[0].finish_reason, self._blocks.done, usage)
        return [*events, self._event(last["status"], response=last)]

    def chain(self, report: ChainReport) -> list[Event]:
        """As `Style`: this API has no place for it."""
        return []

    def failure(self, error: Exception) -> list[Event]:
        """As `Style`."""
        about = body_of(error)["error"]
        told = self._told("failed", self._blocks.done, None)
        told["error"] = {"code": "server_error", "message": about["message"]}
        return [self._event("failed", response=told)]

    def _response(self, reason: str | None, blocks: Sequence[Block], usage: Usage) -> Event:
        told = self._told("incomplete" if reason == "length" else "completed", blocks, usage)
        if reason == "length":
            told["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            told["completed_at"] = int(time.time())
        return told

    def _told(self, status: str, blocks: Sequence[Block], usage: Usage | None) -> Event:
        return {
            **self._head,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [self._item(block, "completed") for block in blocks],
            "usage": usage and _usage(usage),
        }

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        is_done = status == "completed"
        if block.kind == "call":
            return {
                "type": "function_call",
                "id": self._id(block, "fc"),
                "call_id": block.id,
                "name": block.name,
                "arguments": block.text if is_done else "",
                "status": status,
            }
        content = [_part(block)] if is_done else []
        if block.kind == "reasoning":
            item = {"type": "reasoning", "id": self._id(block, "rs"), "summary": []}
            return {**item, "content": content, "status": status}
        item = {"type": "message", "id": self._id(block, "msg"), "role": "assistant"}
        return {**item, "content": content, "status": status}

    def _id(self, block: Block, prefix: str) -> str:
        return self._ids.setdefault(block.index, f"{prefix}_{uuid.uuid4().hex}")

    def _changed(self, change: Change) -> list[Event]:
        """The events of what has happened to a block."""
        what, block, text = change
        place: dict[str, Any] = {"output_index": block.index}
        if what == "open":
            item = self._item(block, "in_progress")
            events = [self._event("output_item.added", **place, item=item)]
            if block.kind != "call":
                place |= {"item_id": item["id"], "content_index": 0}
                empty = _part(Block(block.index, block.kind))
                events.append(self._event("content_part.added", **place, part=empty))
            return events
        item = self._item(block, "completed")
        place["item_id"] = item["id"]
        if block.kind == "call":
            name = "function_call_arguments"
            ended: dict[str, Any] = {"arguments": block.text, "name": block.name}
        else:
            place["content_index"] = 0
            name = "reasoning_text" if block.kind == "reasoning" else "output_text"
            ended = {"text": block.text}
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        if what == "grow":
            return [self._event(f"{name}.delta", **place, delta=text, **logprobs)]
        events = [self._event(f"{name}.done", **place, **ended, **logprobs)]
        if block.kind != "call":
            events.append(self._event("content_part.done", **place, part=_part(block)))
        events.append(self._event("output_item.done", output_index=block.index, item=item))
        return events

    def _event(self, name: str, /, **fields: Any) -> Event:
        self._number += 1
        return {"type": f"response.{name}", "sequence_number": self._number - 1, **fields}


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_answer,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_answer,
    }


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"a tool of type {str(tool.get('type'))[:50]!r} is not possible; only functions are",
            "tools",
        )
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The messages of a chat; items of one turn of the assistant become one message."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        fields = item.model_extra or {}
        if item.type == "message":
            role = fields.get("role", "user")
            role = "system" if role == "developer" else role
            content = _text(fields.get("content"))
            last = messages[-1] if messages else {}
            if role == "system" and last.get("role") == "system":
                last["content"] += f"\n\n{content}"  # most templates take one only
            elif role == "assistant":
                _turn(messages)["content"] = content
            else:
                messages.append({"role": role, "content": content})
        elif item.type == "reasoning":
            parts = fields.get("content") or fields.get("summary") or []
            _turn(messages)["reasoning_content"] = _text(parts)
        elif item.type == "function_call":
            function = {"name": fields.get("name"), "arguments": fields.get("arguments")}
            call = {"id": fields.get("call_id"), "type": "function", "function": function}
            _turn(messages).setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": fields.get("call_id"),
                    "content": _text(fields.get("output")),
                }
            )
        else:
            raise RequestError(f"input of type {item.type[:50]!r} is not supported", "input")
    return messages


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that has not been answered yet, or a new one."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    return last


def _text(content: object) -> str:
    """The text of an item's content.

    Raises:
        RequestError: it is something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        found = part if isinstance(part, dict) else {}
        text = found.get("refusal", found.get("text"))
        if found.get("type") not in _TEXT_PARTS or not isinstance(text, str):
            kind = str(found.get("type"))[:50]
            raise RequestError(f"content of type {kind!r} is not supported; send text", "input")
        texts.append(text)
    return "\n".join(texts)
