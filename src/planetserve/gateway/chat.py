"""From a chat to what the text engine runs: tools, formats of answers, and how answers are read.

`/v1/responses` and `/v1/messages` become a chat first (`responses_api.py`, `anthropic_api.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from planetserve.gateway.constraints import Format
from planetserve.gateway.errors import RequestError
from planetserve.gateway.messages import MessageFormat
from planetserve.gateway.protocol import ChatRequest, ChosenTool, SamplingRequest
from planetserve.gateway.requests import sampling_params, text_request
from planetserve.gateway.served_models import Service
from planetserve.gateway.text import TextRequest

_ANY_OBJECT = {"type": "object"}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_RESERVED_TOKENS = 2048
"""Tokens of an answer without a limit of its own that servers are asked to promise; most are
shorter, and a session may grow."""
_DEFINITIONS = ("$defs", "definitions")


async def prepare_chat(service: Service, body: ChatRequest) -> TextRequest:
    """What a chat asks for, checked.

    Raises:
        RequestError: it cannot be obeyed.
    """
    limits = service.limits
    body.check_supported()
    limits.check_texts(1, body.n)
    limits.check_logprobs(body.top_logprobs, "top_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
    tools, choice = _chosen_tools(service, body)
    form = format_of(body)
    if tools and form is not None:
        raise RequestError(
            "a format of the answer and tools cannot be asked for together; set tool_choice=none "
            "for an answer in that format",
            form.param,
        )
    forced: Literal["one", "many"] | None = None
    if choice == "required":
        forced, form = "many", Format.of_schema(_calls_schema(tools, body), "tools")
    elif isinstance(choice, ChosenTool):
        forced, form = "one", Format.of_schema(_parameters(tools[0]), "tools")
    prompt, prompt_ids = await service.texts.encode_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        template_kwargs=_template_kwargs(body),
        tools=tools,
    )
    limits.check_prompt(prompt_ids, "messages")
    matcher = None if form is None else await service.grammars.compile(form)
    max_tokens, reserved_tokens = body.max_completion_tokens or body.max_tokens, None
    if max_tokens is None:
        max_tokens = service.room(body.n, prompt_ids)
        reserved_tokens = min(max_tokens, _RESERVED_TOKENS)
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    sampling = sampling_params(body, limits, logprobs)
    text = text_request(body, limits, sampling, prompt_ids, max_tokens, grammar=matcher)
    text = dataclasses.replace(text, reserved_tokens=reserved_tokens)
    templates = service.templates
    if templates is None and forced is None:
        return text
    reads_calls = bool(tools) and forced is None
    messages = MessageFormat(
        template=templates and (templates.with_tools if reads_calls else templates.without_tools),
        prompt=prompt,
        tools=tools,
        forced=forced,
        max_calls=1 if body.parallel_tool_calls is False else None,
    )
    return dataclasses.replace(
        text, form=messages, kept_ids=service.kept_ids, reasoning_id=service.reasoning_id
    )


def format_of(body: SamplingRequest) -> Format | None:
    """The format that an answer must have, if one is asked for.

    Raises:
        RequestError: it is incomplete, or there are two.
    """
    form, outputs = body.response_format, body.structured_outputs
    found: list[Format] = []
    if form is not None and form.type == "json_object":
        found.append(Format.of_schema(_ANY_OBJECT, "response_format"))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise RequestError("json_schema is missing", "response_format")
        found.append(Format.of_schema(form.json_schema.schema_, "response_format"))
    if outputs is not None:
        param = "structured_outputs"
        asked = []
        if outputs.json_ is not None:
            asked.append(Format.of_schema(outputs.json_, param))
        if outputs.json_object:
            asked.append(Format.of_schema(_ANY_OBJECT, param))
        if outputs.regex is not None:
            asked.append(Format("regex", outputs.regex, param))
        if outputs.choice is not None:
            asked.append(Format("choice", json.dumps(outputs.choice), param))
        if outputs.grammar is not None:
            asked.append(Format("grammar", outputs.grammar, param))
        if not asked:
            raise RequestError("structured_outputs asks for nothing", param)
        found += asked
    if len(found) > 1:
        raise RequestError("an answer can have one format only", found[1].param)
    return found[0] if found else None


def _chosen_tools(
    service: Service, body: ChatRequest
) -> tuple[list[dict[str, Any]], str | ChosenTool]:
    """The tools that may be called, and which must be."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    choice = body.tool_choice or ("auto" if tools else "none")
    if choice == "none" or (choice == "auto" and not tools):
        return [], "none"
    if not tools:
        raise RequestError("tool_choice needs tools", "tool_choice")
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("two tools have the same name", "tools")
    if isinstance(choice, ChosenTool):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if not tools:
            raise RequestError("tool_choice names a tool that is not in tools", "tool_choice")
    elif choice == "auto" and not (service.templates and service.templates.has_calls):
        raise RequestError(
            "it is not known how this model writes calls of tools; use tool_choice=required or "
            "name a tool, or start the gateway with --response_template FILE",
            "tool_choice",
        )
    return tools, choice


def _calls_schema(tools: Sequence[dict[str, Any]], body: ChatRequest) -> dict[str, Any]:
    """Of a list of calls, as vLLM has it."""
    calls, definitions = [], dict[str, dict[str, Any]]()
    for tool in tools:
        parameters = dict(_parameters(tool))
        for place in _DEFINITIONS:  # references to them begin at the root
            own = parameters.pop(place, {})
            for name, schema in own.items() if isinstance(own, dict) else ():
                if definitions.setdefault(place, {}).setdefault(name, schema) != schema:
                    raise RequestError("two tools define the same name differently", "tools")
        properties = {"name": {"const": tool["function"]["name"]}, "parameters": parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    most = {"maxItems": 1} if body.parallel_tool_calls is False else {}
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}} | most | definitions


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tool["function"].get("parameters") or _NO_PARAMETERS
    return found


def _template_kwargs(body: ChatRequest) -> dict[str, Any]:
    """What the template is given, as vLLM does."""
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return effort | (body.chat_template_kwargs or {})
