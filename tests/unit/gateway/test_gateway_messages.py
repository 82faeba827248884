"""Reasoning and calls of tools, as each family writes them, whole and in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planetserve.errors import ConfigError
from planetserve.gateway.answers import Answer
from planetserve.gateway.messages import MessageDelta, MessageFormat, MessageReader
from planetserve.gateway.response_templates import ResponseTemplates, find_response_template
from planetserve.gateway.text import Delta

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
CHATML = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>assistant<|end_header_id|>\n\n"
CALL = ("weather", {"city": "Paris", "days": 3})

# What a chat template holds that tells the family, the prompt's end, the answer, and its parts.
FAMILIES = {
    "hermes": (
        "<tool_call>", CHATML,
        '<think>\nHmm.\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": '
        '{"city": "Paris", "days": 3}}\n</tool_call>\n<tool_call>\n{"name": "weather", '
        '"arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
        ("I look.", "Hmm.", [CALL, CALL]),
    ),
    "a prompt that has begun to reason": (
        "<tool_call>", CHATML + "<think>\n", "Hmm.\n</think>\n\nHello!", ("Hello!", "Hmm.", []),
    ),
    "a prompt that has ended reasoning": (
        "<tool_call>", CHATML + "<think>\n\n</think>\n\n", "Hello!\n", ("Hello!", "", []),
    ),
    "qwen3.5": (
        "<tool_call> <function= <parameter=", CHATML + "<think>\n",
        "Hmm.\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        ("", "Hmm.", [CALL]),
    ),
    "gemma4": (
        "<|tool_call> <|channel>", "<|turn>model\n",
        '<|channel>thought\nHmm.<channel|><|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}'
        "<tool_call|>",
        ("", "Hmm.", [CALL]),
    ),
    "gpt-oss": (
        "<|channel|> <|message|>", "<|start|>assistant",
        "<|channel|>analysis<|message|>Hmm.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}',
        ("", "Hmm.", [CALL]),
    ),
    "gpt-oss's answer": (
        "<|channel|> <|message|>", "<|start|>assistant",
        "<|channel|>analysis<|message|>Hmm.<|end|><|start|>assistant<|channel|>final<|message|>"
        "Hello!",
        ("Hello!", "Hmm.", []),
    ),
    "mistral": (
        "[TOOL_CALLS] [ARGS]", "[/INST]",
        '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]weather[ARGS]'
        '{"city": "Paris", "days": 3}',
        ("", "", [CALL, CALL]),
    ),
    "mistral before v11": (
        "[TOOL_CALLS]", "[/INST]",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}]',
        ("", "", [CALL]),
    ),
    "llama": (
        "<|python_tag|>", LLAMA,
        '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}',
        ("", "", [CALL]),
    ),
    "llama's answer": (
        "<|python_tag|>", LLAMA, 'Write {"name": "x"}.', ('Write {"name": "x"}.', "", []),
    ),
    "deepseek": (
        "</think>", "<｜Assistant｜><think>\n", "Hmm.\n</think>\n\nHello!", ("Hello!", "Hmm.", []),
    ),
}  # fmt: skip


def templates(marks: str) -> ResponseTemplates:
    found = find_response_template(SimpleNamespace(), marks, None)
    assert found is not None
    return found


def read(form: MessageFormat, pieces: list[str]) -> tuple[str, str, list[tuple[Any, Any]]]:
    """The parts of an answer that comes in these pieces."""
    reader, answer = MessageReader(form), Answer()
    for piece in pieces:
        answer.add(Delta(0, piece, message=reader.add(piece)))
    answer.add(Delta(0, message=reader.finish()))
    calls = [(call.name, json.loads(call.arguments)) for call in answer.calls]
    assert len({call.id for call in answer.calls}) == len(calls)
    return answer.content, answer.reasoning, calls


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_read_whole_and_in_pieces(family: str) -> None:
    marks, prompt, text, wanted = FAMILIES[family]
    form = MessageFormat(template=templates(marks).with_tools, prompt=prompt, tools=TOOLS)
    assert read(form, [text]) == wanted
    for size in (1, 3, 7):
        assert read(form, [text[i : i + size] for i in range(0, len(text), size)]) == wanted


def test_without_tools_a_call_is_text_and_reasoning_is_not() -> None:
    form = MessageFormat(template=templates("<tool_call>").without_tools, prompt=CHATML)
    text = "<think>Hmm.</think>A <tool_call> is"
    assert read(form, [text]) == ("A <tool_call> is", "Hmm.", [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{no json}</tool_call> and more",
        '<tool_call>{"no": "name"}</tool_call>',
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>["a"]</tool_call>',
        "<tool_call>7</tool_call>",
        "<tool_call>" + "[" * 5000 + "</tool_call>",
    ],
)
def test_calls_that_are_none_are_content(text: str) -> None:
    form = MessageFormat(template=templates("<tool_call>").with_tools, prompt=CHATML, tools=TOOLS)
    for size in (1, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        content, reasoning, calls = read(form, pieces)
        assert (reasoning, calls) == ("", [])
        inner = text.removeprefix("<tool_call>").partition("</tool_call>")[0]
        assert inner in content


def test_a_message_that_goes_on_from_a_bad_call_is_content() -> None:
    prompt = CHATML + "<tool_call>{bad</tool_call>"
    form = MessageFormat(template=templates("<tool_call>").with_tools, prompt=prompt, tools=TOOLS)
    assert read(form, [" and so on"]) == (" and so on", "", [])


def test_an_unfinished_call_is_content() -> None:
    form = MessageFormat(template=templates("<tool_call>").with_tools, prompt=CHATML, tools=TOOLS)
    assert read(form, ['Yes. <tool_call>{"name": "wea']) == ('Yes.{"name": "wea', "", [])


def test_text_without_other_parts_keeps_its_white_space() -> None:
    form = MessageFormat(template=templates("<tool_call>").with_tools, prompt=CHATML, tools=TOOLS)
    assert read(form, ["\n Hello ", "you \n"]) == ("\n Hello you \n", "", [])


def test_forced_calls_are_read_from_json() -> None:
    one = MessageFormat(tools=TOOLS, forced="one")
    reader = MessageReader(one)
    deltas = [reader.add(piece) for piece in ('{"city"', ': "Pa', 'ris"}')]
    assert [delta.calls[0].arguments for delta in deltas] == ['{"city"', ': "Pa', 'ris"}']
    assert [delta.calls[0].name for delta in deltas] == ["weather", None, None]
    text = '[{"name":"weather","parameters":{"city":"}\\"]["}},{"name":"weather","parameters":{}}]'
    wanted = [("weather", {"city": '}"]['}), ("weather", {})]
    many = MessageFormat(tools=TOOLS, forced="many")
    assert read(many, list(text)) == read(many, [text]) == ("", "", wanted)
    assert read(many, [text[:20]]) == (text[1:20], "", [])
    deep = '{"name":"weather","parameters":' + "[" * 5000 + "]" * 5000 + "}"
    assert read(many, [f"[{deep}]"]) == (deep, "", [])
    single = MessageFormat(tools=TOOLS, forced="many", max_calls=1)
    assert read(single, [text])[2] == wanted[:1]


def test_reasoning_is_known_while_it_goes_on() -> None:
    form = MessageFormat(template=templates("</think>").without_tools, prompt=CHATML)
    reader = MessageReader(form)
    assert not reader.is_reasoning
    reader.add("<think>")
    assert reader.is_reasoning
    assert reader.add("Hmm.") == MessageDelta(reasoning="Hmm.")
    reader.add("</think>")
    assert not reader.is_reasoning


@pytest.mark.parametrize("marks", ["<tool_call>", "<tool_call> <function= <parameter="])
def test_long_white_space_takes_no_time_to_speak_of(marks: str) -> None:
    """With unbounded patterns this would take minutes."""
    form = MessageFormat(template=templates(marks).with_tools, prompt=CHATML, tools=TOOLS)
    space = " " * 200_000
    assert read(form, [f"a{space}b"]) == (f"a{space}b", "", [])
    if "<function=" in marks:
        call = f"<tool_call><function=weather><parameter=city>a{space}b</parameter></function>"
        (found,) = read(form, [call + "</tool_call>"])[2]
        assert found == ("weather", {"city": f"a{space}b"})


def test_a_tokenizer_s_own_template_comes_before_its_family_s(tmp_path: Path) -> None:
    own = {"start_anchor": ">", "fields": {"reasoning": {"open": "(", "close": ")"}, "content": {}}}
    tokenizer = SimpleNamespace(response_template=own)
    found = find_response_template(tokenizer, "<tool_call>", None)
    assert found is not None
    assert (found.has_calls, found.reasoning_open) == (False, "(")
    assert find_response_template(SimpleNamespace(), "a template", None) is None
    path = tmp_path / "template.json"
    for text in ("{", '"x"', '{"fields": 3}', '{"start_anchor": "x", "fields": {"a": {"b": 1}}}'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            find_response_template(tokenizer, None, str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        find_response_template(tokenizer, None, str(tmp_path / "none"))
