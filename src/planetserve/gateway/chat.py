"""From a chat to what the text engine runs: tools, formats of answers, and how answers are read.

`/v1/responses` and `/v1/messages` become a chat first (`responses.py`, `anthropic.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from planetserve.gateway.constraints import json_grammar, text_grammar
from planetserve.gateway.errors import RequestError
from planetserve.gateway.messages import MessageFormat
from planetserve.gateway.protocol import ChatRequest, ChosenTool, SamplingRequest
from planetserve.gateway.requests import sampling_params, text_request
from planetserve.gateway.service import Service
from planetserve.gateway.text import TextRequest

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
    grammar, param = format_grammar(body), "response_format"
    if tools and grammar is not None:
        raise RequestError(
            "a format of the answer and tools cannot be asked for together; set tool_choice=none "
            "for an answer in that format",
            param,
        )
    forced: Literal["one", "many"] | None = None
    if choice == "required":
        forced, param = "many", "tools"
        grammar = _grammar(lambda: json_grammar(_calls_schema(tools, body)), param)
    elif isinstance(choice, ChosenTool):
        forced, param = "one", "tools"
        grammar = _grammar(lambda: json_grammar(_parameters(tools[0])), param)
    prompt, prompt_ids = await service.texts.encode_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        template_kwargs=_template_kwargs(body),
        tools=tools,
    )
    limits.check_prompt(prompt_ids, "messages")
    matcher = None if grammar is None else await service.grammars.compile(grammar, param)
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
    form = MessageFormat(
        template=templates and (templates.with_tools if reads_calls else templates.without_tools),
        prompt=prompt,
        tools=tools,
        forced=forced,
        max_calls=1 if body.parallel_tool_calls is False else None,
    )
    return dataclasses.replace(
        text, form=form, kept_ids=service.kept_ids, reasoning_id=service.reasoning_id
    )


def format_grammar(body: SamplingRequest) -> str | None:
    """The grammar of the format that an answer must have, if one is asked for.

    Raises:
        RequestError: it is none, or there are two.
    """
    form, outputs = body.response_format, body.structured_outputs
    found: list[tuple[str, str, Any]] = []
    if form is not None and form.type == "json_object":
        found.append(("response_format", "schema", {"type": "object"}))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise RequestError("json_schema is missing", "response_format")
        found.append(("response_format", "schema", form.json_schema.schema_))
    if outputs is not None:
        given = {
            "schema": outputs.json_,
            "regex": outputs.regex,
            "choice": outputs.choice and json.dumps(outputs.choice),
            "grammar": outputs.grammar,
        }
        asked = [("structured_outputs", kind, x) for kind, x in given.items() if x is not None]
        if outputs.json_object:
            asked.append(("structured_outputs", "schema", {"type": "object"}))
        if not asked:
            raise RequestError("structured_outputs asks for nothing", "structured_outputs")
        found += asked
    if len(found) > 1:
        raise RequestError("an answer can have one format only", found[1][0])
    if not found:
        return None
    param, kind, value = found[0]
    if kind != "schema":
        return _grammar(lambda: text_grammar(kind, value), param)

    def of_schema() -> str:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, dict):
            raise ValueError("the schema is no object")
        return json_grammar(schema)

    return _grammar(of_schema, param)


def _grammar(make: Any, param: str) -> str:
    try:
        grammar: str = make()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param} is not usable: {str(error)[:200]}", param) from error
    return grammar


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
            for name, schema in parameters.pop(place, {}).items():
                if definitions.setdefault(place, {}).setdefault(name, schema) != schema:
                    raise ValueError(f"two tools define {name!r} differently")
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
