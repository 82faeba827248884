"""Open Responses and Anthropic's API over a real swarm, asked by their official clients.

The seven checks of Open Responses' public suite (openresponses/openresponses) are here as tests; an
image is refused, since the model reads text only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from gateways import gateway, openai_client, web_client
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from planetserve.gateway.server import Address
from planetserve.testing.swarm import LocalSwarm

QUESTION = "What is a list?"
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "parameters": WEATHER}
CLAUDE_TOOL: Any = {"name": "weather", "description": "It tells.", "input_schema": WEATHER}
TEMPLATE = """{%- for message in messages %}{%- if message.role == 'robot' %}
{{ raise_exception('no robots') }}{% endif %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>
{%- if enable_thinking %}<think>{% endif %}{% endif %}"""
FIELDS = {"reasoning_content": {"open": "<think>", "close": "empty"}, "content": {}}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
REQUIRED = """id object created_at completed_at status incomplete_details model previous_response_id
instructions output error tools tool_choice truncation parallel_tool_calls text top_p
presence_penalty frequency_penalty top_logprobs temperature reasoning user usage max_output_tokens
max_tool_calls store background service_tier metadata safety_identifier prompt_cache_key""".split()


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("demo", ["0:3", "3:8"]) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def address(demo_swarm: LocalSwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A gateway with a template that can begin to reason; the model's word "empty" ends that."""
    folder: Path = tmp_path_factory.mktemp("templates")
    (folder / "chat.jinja").write_text(TEMPLATE)
    response = {"start_anchor": "<|assistant|>", "fields": FIELDS}
    (folder / "response.json").write_text(json.dumps(response))
    with gateway(
        demo_swarm, chat_template=str(folder / "chat.jinja"), api_key=("secret",),
        response_template=str(folder / "response.json"),
    ) as found:  # fmt: skip
        yield found


@pytest.fixture(scope="module")
def client(address: Address) -> Iterator[openai.OpenAI]:
    with openai_client(address, "secret") as made:
        yield made


@pytest.fixture(scope="module")
def claude(address: Address) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address.url, api_key="secret", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def web(address: Address) -> Iterator[httpx2.Client]:
    with web_client(address, "secret") as made:
        yield made


def ask(web: httpx2.Client, **fields: Any) -> dict[str, Any]:
    """A response without a stream, checked against the specification."""
    done = web.post("/v1/responses", json={"model": "demo", "temperature": 0, **fields})
    assert done.status_code == 200, done.text
    found: dict[str, Any] = done.json()
    assert set(REQUIRED) <= set(found)
    Response.model_validate(found)
    return found


def stream(web: httpx2.Client, **fields: Any) -> list[dict[str, Any]]:
    """The events of a response, each checked against the specification."""
    body = {"model": "demo", "temperature": 0, "stream": True, **fields}
    events = []
    with web.stream("POST", "/v1/responses", json=body) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def types(events: Sequence[dict[str, Any]]) -> list[str]:
    """Their types, each once where it repeats."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [
        name for place, name in enumerate(names) if name not in names[max(0, place - 1) : place]
    ]


def message_text(response: dict[str, Any]) -> str:
    (message,) = [item for item in response["output"] if item["type"] == "message"]
    assert message["role"] == "assistant"
    text: str = message["content"][0]["text"]
    return text


def test_basic_response(web: httpx2.Client, client: openai.OpenAI) -> None:
    found = ask(web, input=[{"type": "message", "role": "user", "content": QUESTION}])
    assert found["status"] == "completed"
    assert found["store"] is False
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert message_text(found) == chat.choices[0].message.content
    assert chat.usage is not None
    assert found["usage"]["output_tokens"] == chat.usage.completion_tokens
    by_client = client.responses.create(model="demo", input=QUESTION, temperature=0)
    assert by_client.output_text == chat.choices[0].message.content
    cut = ask(web, input=QUESTION, max_output_tokens=2)
    assert (cut["status"], cut["incomplete_details"]) == (
        "incomplete", {"reason": "max_output_tokens"},
    )  # fmt: skip


def test_streaming_response(web: httpx2.Client) -> None:
    wanted = message_text(ask(web, input=QUESTION))
    events = stream(web, input=QUESTION)
    assert types(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(event.get("delta", "") for event in events) == wanted
    assert message_text(events[-1]["response"]) == wanted
    assert set(REQUIRED) <= set(events[-1]["response"])
    ended = [event for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == [event["item"] for event in ended]
    assert stream(web, input=QUESTION, max_output_tokens=2)[-1]["type"] == "response.incomplete"


def test_system_prompt(web: httpx2.Client) -> None:
    spoken = [
        {"type": "message", "role": "system", "content": "Be brief."},
        {"type": "message", "role": "user", "content": QUESTION},
    ]
    by_message = ask(web, input=spoken)
    by_instructions = ask(web, input=QUESTION, instructions="Be brief.")
    assert message_text(by_message) == message_text(by_instructions)
    assert by_instructions["instructions"] == "Be brief."
    assert by_message["usage"]["input_tokens"] > ask(web, input=QUESTION)["usage"]["input_tokens"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_tool_calling_streaming_and_not(web: httpx2.Client, choice: Any) -> None:
    asked = {"input": QUESTION, "tools": [TOOL], "tool_choice": choice}
    asked["parallel_tool_calls"] = False
    found = ask(web, **asked)
    (call,) = found["output"]
    assert (call["type"], call["name"], call["status"]) == (
        "function_call", "weather", "completed",
    )  # fmt: skip
    assert set(json.loads(call["arguments"])) == {"city", "days"}
    assert found["tools"][0]["name"] == "weather"
    events = stream(web, **asked)
    assert types(events) == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(event.get("delta", "") for event in events) == call["arguments"]


def test_image_input_is_refused(web: httpx2.Client) -> None:
    part = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    spoken = [{"type": "message", "role": "user", "content": [part]}]
    done = web.post("/v1/responses", json={"model": "demo", "input": spoken})
    assert done.status_code == 400
    assert done.json()["error"]["param"] == "input"


def test_multi_turn(web: httpx2.Client) -> None:
    first = ask(
        web, input=QUESTION, tools=[TOOL], tool_choice={"type": "function", "name": "weather"}
    )
    call = first["output"][0]
    spoken: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
        *first["output"],
        {"type": "function_call_output", "call_id": call["call_id"], "output": "It rains."},
        {"role": "developer", "content": "Be brief."},
    ]
    second = ask(web, input=spoken, max_output_tokens=12)
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert len(message_text(second)) > 0


def test_reasoning_is_an_item(web: httpx2.Client) -> None:
    asked = {"input": QUESTION, "chat_template_kwargs": {"enable_thinking": True}}
    found = ask(web, **asked)
    assert [item["type"] for item in found["output"]] == ["reasoning", "message"]
    assert 0 < found["usage"]["output_tokens_details"]["reasoning_tokens"]
    events = stream(web, **asked)
    assert "reasoning_text.delta" in types(events)
    told = [item["content"][0]["text"] for item in events[-1]["response"]["output"]]
    assert told == [item["content"][0]["text"] for item in found["output"]]


def test_a_response_follows_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "name": "weather", "schema": WEATHER, "strict": True}
    done = client.responses.create(model="demo", input=QUESTION, text={"format": form})
    assert set(json.loads(done.output_text)) == {"city", "days"}


def test_an_anthropic_message(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "demo", "max_tokens": 50, "extra_body": {"temperature": 0}, "system": "Be brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
    }  # fmt: skip
    done = claude.messages.create(**asked)
    wanted = client.responses.create(
        model="demo", input=QUESTION, instructions="Be brief.", temperature=0, max_output_tokens=50
    )
    (block,) = done.content
    assert block.type == "text"
    assert (block.text, done.stop_reason) == (wanted.output_text, "end_turn")
    counted = claude.messages.count_tokens(
        model="demo", system=asked["system"], messages=asked["messages"]
    )
    assert counted.input_tokens == done.usage.input_tokens
    with claude.messages.stream(**asked) as streamed:
        names = [event.type for event in streamed]
        (told,) = streamed.get_final_message().content
    assert told.type == "text"
    assert told.text == block.text
    assert names[0] == "message_start"
    assert names[-1] == "message_stop"
    cut = claude.messages.create(**(asked | {"max_tokens": 2}))
    assert cut.stop_reason == "max_tokens"
    stopped = claude.messages.create(**asked, stop_sequences=[block.text[5:10]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", block.text[5:10])
    # An answer that has begun goes on.
    spoken: list[Any] = [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is"},
    ]  # fmt: skip
    went_on = claude.messages.create(
        model="demo", max_tokens=9, messages=spoken, extra_body={"temperature": 0}
    )
    chat = client.chat.completions.create(
        model="demo", messages=spoken, temperature=0, max_tokens=9,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )  # fmt: skip
    assert went_on.content[0].type == "text"
    assert went_on.content[0].text == chat.choices[0].message.content


def test_anthropic_tools_and_thinking(claude: anthropic.Anthropic) -> None:
    spoken: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {
        "model": "demo", "max_tokens": 60, "tools": [CLAUDE_TOOL],
        "extra_body": {"temperature": 0},
    }  # fmt: skip
    choice: Any = {"type": "tool", "name": "weather"}
    done = claude.messages.create(**asked, messages=spoken, tool_choice=choice)
    (use,) = done.content
    assert use.type == "tool_use"
    assert done.stop_reason == "tool_use"
    assert set(use.input) == {"city", "days"}
    any_choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    with claude.messages.stream(**asked, messages=spoken, tool_choice=any_choice) as streamed:
        (block,) = streamed.get_final_message().content
    assert block.type == "tool_use"
    assert set(block.input) == {"city", "days"}
    spoken += [
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use.model_dump()]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": use.id, "content": "rain"},
            {"type": "text", "text": "And now?"},
        ]},
    ]  # fmt: skip
    after = claude.messages.create(**asked, messages=spoken, tool_choice={"type": "none"})
    assert after.content[0].type == "text"
    thought = claude.messages.create(
        model="demo", max_tokens=60, messages=spoken[:1],
        extra_body={"temperature": 0},
        thinking={"type": "enabled", "budget_tokens": 1024},
    )  # fmt: skip
    assert [block.type for block in thought.content] == ["thinking", "text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"conversation": "x"},
        {"truncation": "auto"},
        {"input": []},
        {"input": 3},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"type": "function_call", "name": "f", "arguments": "{", "call_id": "1"}]},
        {"input": [{"role": "robot", "content": "x"}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [TOOL], "tool_choice": {"type": "web_search"}},
        {"tools": [TOOL]},
        {"text": {"format": 3}},
        {"text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
        {"temperature": -1},
    ],
)  # fmt: skip
def test_bad_responses_requests(web: httpx2.Client, fields: dict[str, Any]) -> None:
    done = web.post("/v1/responses", json={"model": "demo", "input": "x", **fields})
    assert done.status_code == 400, done.text
    assert set(done.json()["error"]) == {"message", "type", "param", "code"}


def test_anthropic_errors_have_anthropic_s_shape(
    address: Address, claude: anthropic.Anthropic, web: httpx2.Client
) -> None:
    image: Any = [{"type": "image", "source": {"type": "url", "url": "http://x"}}]
    for fields in (
        {"messages": [{"role": "user", "content": image}]},
        {"messages": []},
        {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        {"max_tokens": 0},
    ):
        given: dict[str, Any] = {
            "model": "demo", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}],
        }  # fmt: skip
        with pytest.raises(anthropic.BadRequestError) as caught:
            claude.messages.create(**(given | fields))
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**(given | {"model": "other"}))
    with (
        anthropic.Anthropic(base_url=address.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as refused,
    ):
        stranger.messages.create(**given)
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["error"]["type"] == "authentication_error"
    broken = web.post("/v1/messages", content=b"{", headers={"Content-Type": "application/json"})
    assert broken.json()["type"] == "error"


def test_streams_end_with_an_error_of_their_own() -> None:
    with (
        LocalSwarm("demo", ["0:3", "3:8"]) as swarm,
        gateway(swarm, wait_for_blocks_timeout=0.5, max_retries=1, step_timeout=5) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="x", max_retries=0) as client,
        anthropic.Anthropic(base_url=found.url, api_key="x", max_retries=0) as claude,
    ):
        extra = {"ignore_eos": True}
        with (
            client.responses.create(
                model="demo", input="A", stream=True, extra_body=extra
            ) as responses,
            claude.messages.create(
                model="demo", max_tokens=1900, stream=True,
                messages=[{"role": "user", "content": "A"}],
                extra_body={"stop_sequences": ["no such text"]},
            ) as messages,
        ):  # fmt: skip
            next(iter(responses))
            next(iter(messages))
            swarm.stop_server(swarm.servers[1])
            last = list(responses)[-1]
            assert last.type == "response.failed"
            assert last.response.error is not None
            with pytest.raises(anthropic.APIStatusError):
                list(messages)
