"""Answers in a format, calls of tools and reasoning, over a real swarm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from gateways import gateway, openai_client, web_client

from planetserve.gateway.server import Address
from planetserve.testing.swarm import LocalSwarm

HELLO = [{"role": "user", "content": "What is a list?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": PERSON}}
    for name in ("add_person", "drop_person")
]
TEMPLATE = """{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}[CALL]{{ call.function.name }}
{%- for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}
{%- endfor %}{{ eos_token }}{% endfor %}
{%- for tool in tools or [] %}[TOOL]{{ tool.function.name }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("demo", ["0:3", "3:8"]) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def address(demo_swarm: LocalSwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A gateway with templates for a model that knows neither tools nor reasoning."""
    folder: Path = tmp_path_factory.mktemp("templates")
    (folder / "chat.jinja").write_text(TEMPLATE)
    response = {
        "start_anchor": "<|assistant|>",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "empty"},
            "tool_calls": {
                "open": "[CALL]", "close": "[END]", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {},
        },
    }  # fmt: skip
    (folder / "response.json").write_text(json.dumps(response))
    with gateway(
        demo_swarm, chat_template=str(folder / "chat.jinja"),
        response_template=str(folder / "response.json"),
    ) as found:  # fmt: skip
        yield found


@pytest.fixture(scope="module")
def client(address: Address) -> Iterator[openai.OpenAI]:
    with openai_client(address) as made:
        yield made


@pytest.fixture(scope="module")
def web(address: Address) -> Iterator[httpx2.Client]:
    with web_client(address) as made:
        yield made


def is_person(text: str) -> bool:
    found = json.loads(text)
    assert set(found) == {"name", "age", "kind"}
    assert found["kind"] in ("cat", "dog")
    return isinstance(found["age"], int)


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_a_schema(client: openai.OpenAI, temperature: float) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    asked: dict[str, Any] = {
        "model": "demo", "messages": HELLO, "temperature": temperature, "seed": 3,
        "response_format": form, "n": 3,
    }  # fmt: skip
    done = client.chat.completions.create(**asked)
    contents = [choice.message.content for choice in done.choices]
    assert all(is_person(content or "") for content in contents)
    assert {choice.finish_reason for choice in done.choices} == {"stop"}
    texts = ["", "", ""]
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == contents


def count_steps(web: httpx2.Client) -> float:
    """Steps that answers have taken, besides those of prompts."""
    lines = web.get("/metrics").text.splitlines()
    name = "vllm:inter_token_latency_seconds_count"
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_forced_tokens_need_no_steps(web: httpx2.Client, client: openai.OpenAI) -> None:
    """What a grammar leaves no choice about goes through the chain with the token before it."""
    forced = "A list is a list of lists in a list of lists."
    asked: dict[str, Any] = {"model": "demo", "prompt": "A", "max_tokens": 100, "temperature": 0}
    extra = {"structured_outputs": {"regex": f"({forced})(yes|no)"}}
    before = count_steps(web)
    done = client.completions.create(**asked, extra_body=extra)
    assert done.choices[0].text in (f"{forced}yes", f"{forced}no")
    assert done.usage is not None
    assert done.usage.completion_tokens > 10
    assert count_steps(web) - before <= 3
    # With log-probabilities each token has a step, and the text is the same.
    shown = client.completions.create(**asked, extra_body=extra, logprobs=1)
    assert shown.choices[0].text == done.choices[0].text
    assert shown.choices[0].logprobs is not None
    assert shown.usage is not None
    assert len(shown.choices[0].logprobs.tokens or []) == shown.usage.completion_tokens
    cut = client.completions.create(**(asked | {"max_tokens": 4}), extra_body=extra)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (
        done.choices[0].text[: len(cut.choices[0].text)], "length",
    )  # fmt: skip
    assert cut.usage is not None
    assert cut.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("outputs", "wanted"),
    [
        ({"regex": "[ab]{3}"}, ("a", "b")),
        ({"choice": ["red", "green"]}, ("red", "green")),
        ({"grammar": 'start: "x" | "yes"'}, ("x", "yes")),
        ({"grammar": 'root ::= "x" | "yes"'}, ("x", "yes")),
        ({"json": {"enum": [1, 2]}}, ("1", "2")),
        ({"json": json.dumps({"enum": [1, 2]})}, ("1", "2")),
    ],
)
def test_structured_outputs(
    client: openai.OpenAI, outputs: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    done = client.completions.create(
        model="demo", prompt="A", extra_body={"structured_outputs": outputs, "top_k": 50}
    )
    assert done.choices[0].text.startswith(wanted)
    assert done.choices[0].finish_reason == "stop"


def test_json_objects(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="demo", messages=HELLO, response_format={"type": "json_object"}, max_tokens=60,
        temperature=0,
    )  # fmt: skip
    (choice,) = done.choices
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "demo", "messages": HELLO, "tools": TOOLS, "temperature": 0,
        "tool_choice": {"type": "function", "function": {"name": "drop_person"}},
    }  # fmt: skip
    done = client.chat.completions.create(**asked)
    (choice,) = done.choices
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, choice.finish_reason) == ("drop_person", "stop")
    assert is_person(call.function.arguments)
    assert choice.message.content is None
    name, arguments, pieces = "", "", 0
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            for piece in chunk.choices[0].delta.tool_calls or []:
                assert (piece.index, bool(piece.id)) == (0, not pieces)
                pieces += 1
                assert piece.function is not None
                name += piece.function.name or ""
                arguments += piece.function.arguments or ""
    assert (name, arguments) == ("drop_person", call.function.arguments)
    assert pieces > 2


def test_some_tool_is_called_and_its_answer_goes_on(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "demo", "tools": TOOLS, "tool_choice": "required", "temperature": 0,
        "parallel_tool_calls": False,
    }  # fmt: skip
    done = client.chat.completions.create(messages=HELLO, **asked)  # type: ignore[arg-type]
    (choice,) = done.choices
    (call,) = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert call.type == "function"
    assert is_person(call.function.arguments)
    with client.chat.completions.create(messages=HELLO, stream=True, **asked) as stream:  # type: ignore[arg-type]
        chunks = [chunk.choices[0] for chunk in stream]
    (piece,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert piece.function is not None
    assert piece.function.arguments == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    answered: list[Any] = [
        *HELLO, choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]  # fmt: skip
    last = client.chat.completions.create(
        model="demo", messages=answered, tools=TOOLS, tool_choice="none", max_tokens=5
    )
    assert last.choices[0].message.tool_calls is None


def test_the_template_sees_tools_and_calls(web: httpx2.Client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 7}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokens = web.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = web.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert "[CALL]f a=7" in text
    assert "[TOOL]add_person[TOOL]drop_person" in text


def test_reasoning_is_told_apart(client: openai.OpenAI) -> None:
    """The prompt has begun to reason; the model's own words end that."""
    messages: list[Any] = [*HELLO, {"role": "assistant", "content": "<think>"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    asked: dict[str, Any] = {
        "model": "demo", "messages": messages, "temperature": 0, "max_tokens": 40,
    }  # fmt: skip
    message = client.chat.completions.create(**asked, extra_body=extra)
    reasoning = message.choices[0].message.model_extra["reasoning_content"]  # type: ignore[index]
    content = message.choices[0].message.content
    assert reasoning
    assert content
    assert "empty" not in reasoning
    assert message.usage is not None
    assert message.usage.completion_tokens_details is not None
    num_reasoning = message.usage.completion_tokens_details.reasoning_tokens or 0
    assert 0 < num_reasoning < message.usage.completion_tokens
    told = {"reasoning_content": "", "content": ""}
    with client.chat.completions.create(**asked, extra_body=extra, stream=True) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta.model_dump(exclude_none=True)
            for name in told:
                told[name] += delta.get(name, "")
    assert told == {"reasoning_content": reasoning, "content": content}
    hidden = client.chat.completions.create(
        **asked, extra_body={**extra, "include_reasoning": False}
    )
    assert "reasoning_content" not in (hidden.choices[0].message.model_extra or {})
    # A grammar binds what follows the reasoning.
    bound = client.chat.completions.create(
        **asked, extra_body={**extra, "structured_outputs": {"choice": ["red", "green"]}}
    )
    assert bound.choices[0].message.content in ("red", "green")
    assert bound.choices[0].message.model_extra["reasoning_content"] == reasoning  # type: ignore[index]


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": value}}}


DEEP: Any = {}
for _ in range(400):
    DEEP = {"properties": {"a": DEEP}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        schema({"type": "nothing"}),
        schema({"not": {"type": "string"}}),
        schema({"$ref": "http://127.0.0.1/x"}),
        schema({"type": "string", "pattern": "(?=a)b"}),
        schema({"enum": ["x" * 200_000]}),
        schema(DEEP),
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"regex": "|".join(f"(.*{i}.*){{9}}" for i in range(7000))}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {"grammar": "root ::= ("}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"regex": "\ud800"}},
        {"structured_outputs": {"grammar": "root ::= " + "(" * 5000}},
        {"structured_outputs": {"grammar": "x" * 200_000}},
        schema({"enum": ["\ud800"]}),
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"json": "[1]"}},
        {"structured_outputs": {"structural_tag": "x"}},
        {"structured_outputs": {"regex": "a"}, "min_tokens": 3},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"tools": TOOLS, "response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": "sometimes"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": TOOLS + TOOLS},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "{"}}]}]},
        {"chat_template_kwargs": {"tools": []}},
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(web: httpx2.Client, fields: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_tokens": 5, **fields}
    headers = {"Content-Type": "application/json"}
    response = web.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]
    assert len(response.content) < 3000


def test_calls_need_to_be_readable(demo_swarm: LocalSwarm) -> None:
    with (
        gateway(demo_swarm) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="response_template"),
    ):
        client.chat.completions.create(model="demo", messages=HELLO, tools=TOOLS)  # type: ignore[arg-type]
