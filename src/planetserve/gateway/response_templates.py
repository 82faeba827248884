"""How families write reasoning and calls of tools, for tokenizers that bring no response template.

The format is transformers' (`transformers.utils.chat_parsing`). A family is known by what its chat
template writes, so that finetuned models under the name of another family are read too.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    load_response_template,
)

from planetserve.errors import ConfigError

_SPACE = {r"\s*": r"\s{0,8}", r"\s+": r"\s{1,8}"}
_THINK = {"open": "<think>", "close": "</think>", "content": "text"}
_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_CHATML = {"start_anchor": "<|im_start|>assistant\n"}
_CHATML_END = {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>)"}

_FAMILIES: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    # Qwen3-Coder, Qwen3.5
    (("<tool_call>", "<function=", "<parameter="), {
        **_CHATML,
        "fields": {
            "reasoning_content": _THINK,
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
                },
                "transform": _FUNCTION,
            },
            "content": _CHATML_END,
        },
    }),
    # Qwen2.5, Qwen3, Hermes
    (("<tool_call>",), {
        **_CHATML,
        "fields": {
            "reasoning_content": _THINK,
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": _CHATML_END,
        },
    }),
    # Gemma 4
    (("<|tool_call>", "<|channel>"), {
        "start_anchor": ["<|turn>model\n", "<tool_response|>"],
        "fields": {
            "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
            "tool_calls": {
                "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
                "close": "<tool_call|>",
                "repeats": True,
                "content": "json",
                "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
                "transform": _FUNCTION,
            },
            "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"]},
        },
    }),
    # gpt-oss
    (("<|channel|>", "<|message|>"), {
        "start_anchor": "<|start|>assistant",
        "fields": {
            "reasoning_content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
                "close": ["<|end|>", "<|return|>"],
                "repeats": True,
                "join": "\n",
            },
            "tool_calls": {
                "open_pattern": r"(?:<\|start\|>assistant)?(?:<\|channel\|>commentary )?"
                                r" ?to=functions\.(?P<name>[\w.-]+)[^{]{0,64}?<\|message\|>",
                "close": ["<|call|>", "<|end|>"],
                "repeats": True,
                "content": "json",
                "transform": _FUNCTION,
            },
            "content": {
                "open_pattern": r"(?:<\|start\|>assistant)?"
                                r"<\|channel\|>(?:final|commentary)(?: <\|constrain\|>\w+)?"
                                r"<\|message\|>",
                "close": ["<|end|>", "<|return|>"],
                "repeats": True,
                "join": "\n",
            },
        },
    }),
    # Mistral, since v11: the name, then the arguments
    (("[TOOL_CALLS]", "[ARGS]"), {
        "start_anchor": "[/INST]",
        "fields": {
            "reasoning_content": {"open": "[THINK]", "close": "[/THINK]"},
            "tool_calls": {
                "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]",
                "close_pattern": r"(?=\[TOOL_CALLS\])|</s>",
                "repeats": True,
                "content": "json",
                "transform": _FUNCTION,
            },
            "content": {"close": "</s>"},
        },
    }),
    # Mistral before: a list of calls
    (("[TOOL_CALLS]",), {
        "start_anchor": "[/INST]",
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*\[TOOL_CALLS\]\s*",
                "close": "</s>",
                "content": "json",
            },
            "content": {"close": "</s>"},
        },
    }),
    # Llama 3
    (("<|python_tag|>",), {
        "start_anchor": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "fields": {
            "tool_calls": {
                "open_pattern": r'\A\s*(?:<\|python_tag\|>)?(?=\{\s*"(?:name|type)")',
                "close_pattern": r"<\|eo[mt]_id\|>",
                "content": "json",
            },
            "content": {"close_pattern": r"<\|eo[mt]_id\|>"},
        },
    }),
    # DeepSeek R1 and others that reason, without a format of calls
    (("</think>",), {
        "start_anchor_pattern": r"<｜Assistant｜>|<\|im_start\|>assistant\n|"
                                r"<\|assistant\|>\n?|"
                                r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        "fields": {"reasoning_content": _THINK, "content": {}},
    }),
)  # fmt: skip


class ResponseTemplates:
    """How answers of one model are read: with calls of tools, and without.

    Args:
        template: of transformers' format.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, template: Mapping[str, Any]):
        try:
            template = _bounded(copy.deepcopy(dict(template)))
            self.with_tools: ResponseTemplate = load_response_template(template)
            fields = {
                name: field for name, field in template["fields"].items() if name != "tool_calls"
            }
            self.without_tools: ResponseTemplate | None = None
            if fields:
                self.without_tools = load_response_template({**template, "fields": fields})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"the response template cannot be used: {error}") from error
        self.has_calls = "tool_calls" in template["fields"]
        self.reasoning_open: str | None = None
        """What begins reasoning, if it is always the same."""
        for name in ("reasoning_content", "reasoning", "thinking"):
            opening = template["fields"].get(name, {}).get("open")
            if isinstance(opening, str):
                self.reasoning_open = opening
        self._written = json.dumps(template, ensure_ascii=False).replace("\\", "")

    def needs(self, special_token: str) -> bool:
        """Whether parts are told apart by this special token."""
        return special_token in self._written


def _bounded(value: Any, is_pattern: bool = False) -> Any:
    """A template whose patterns take little white space at once. The time of a search for `\\s*`
    grows with the square of a run of it, and a model may be made to write long ones."""
    if isinstance(value, dict):
        return {key: _bounded(one, str(key).endswith("pattern")) for key, one in value.items()}
    if isinstance(value, str) and is_pattern:
        return re.sub(r"\\s[*+]", lambda found: _SPACE[found[0]], value)
    return value


def find_response_template(
    tokenizer: Any, chat_template: str | None, path: str | None
) -> ResponseTemplates | None:
    """The one in a file, or the tokenizer's own, or the one of its family; None: all text is
    content.

    Raises:
        ConfigError: the file cannot be read, or what was found is no response template.
    """
    if path is not None:
        try:
            return ResponseTemplates(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"cannot read --response_template {path}: {error}") from error
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        return ResponseTemplates(own)
    for marks, template in _FAMILIES:
        if all(mark in (chat_template or "") for mark in marks):
            return ResponseTemplates({"defaults": {"role": "assistant"}, **template})
    return None
