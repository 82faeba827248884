"""Prompts to tokens and tokens to words: the tokenizer and the chat template, in a thread.

A tokenizer is not safe to use from several threads, so one thread does all of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from planetserve.errors import ConfigError, ModelError
from planetserve.gateway.errors import RequestError
from planetserve.gateway.protocol import Message, ToolCall
from planetserve.gateway.response_templates import ResponseTemplates, find_response_template

T = TypeVar("T")

_NOT_FOR_TEMPLATES = ("chat_template", "tokenize", "return_dict", "conversation", "tools")


class Texts:
    """A model's tokenizer.

    Args:
        tokenizer: of transformers.
        chat_template: a template instead of the tokenizer's own.
        max_tokens: longest text; much longer ones are refused before they are looked at.

    Raises:
        ModelError: it is none of the tokenizers library, and cannot decode token by token.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, max_tokens: int):
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise ModelError(
                "the model's tokenizer has no tokenizer.json, which the gateway needs; convert it "
                "with transformers, or use generate()"
            )
        self._tokenizer = tokenizer
        self._template = chat_template
        # Another copy, whose settings no call of transformers' wrapper changes.
        self.decoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        """For the event loop; only read."""
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        self._max_chars = max_tokens * longest
        self._max_tokens = max_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planetserve-gateway-text")

    @property
    def chat_template(self) -> str | None:
        """The template of chats, if there is one."""
        found = self._template or self._tokenizer.chat_template
        return found if isinstance(found, str) else None

    def response_template(self, path: str | None) -> ResponseTemplates | None:
        """How the model's answers are read, as `find_response_template` finds it.

        Raises:
            ConfigError: it cannot be used.
        """
        return find_response_template(self._tokenizer, self.chat_template, path)

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's end of text."""
        found = self._tokenizer.eos_token_id
        return found if isinstance(found, int) else None

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """The tokens of a text.

        Raises:
            RequestError: it is far too long, or no text.
        """
        self._check_length(text, param)

        def encode() -> list[int]:
            try:
                found: list[int] = self._tokenizer.encode(
                    text, add_special_tokens=add_special_tokens
                )
            except (TypeError, ValueError) as error:  # lone surrogates
                raise RequestError(f"{param} cannot be tokenized: is it text?", param) from error
            return found

        return await self._call(encode)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        add_special_tokens: bool,
        template_kwargs: dict[str, Any] | None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> tuple[str, list[int]]:
        """A chat as its template writes it, and the tokens of that.

        Raises:
            RequestError: there is no template, it refuses the messages, or they are not text.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt=false", "continue_final_message"
            )
        kwargs = dict(template_kwargs or {})
        for name in _NOT_FOR_TEMPLATES:
            if name in kwargs:
                raise RequestError(f"{name} cannot be given to a template", "chat_template_kwargs")
        chat = [_as_dict(message) for message in messages]
        self._check_length("".join(message["content"] for message in chat), "messages")
        self._check_length(json.dumps(tools), "tools")

        def render() -> str:
            if self._template is None and not self._tokenizer.chat_template:
                raise RequestError(
                    "the model has no chat template; use /v1/completions, or start the gateway "
                    "with --chat_template FILE"
                )
            settings = {
                **kwargs,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "chat_template": self._template,
                "tools": list(tools) or None,
            }
            try:
                text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, **settings)
            except Exception as error:  # templates of checkpoints raise whatever they like
                raise RequestError(
                    f"the chat template refuses these messages: {error}", "messages"
                ) from error
            return text

        text = await self._call(render)
        ids = await self.encode(text, add_special_tokens=add_special_tokens, param="messages")
        return text, ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of some tokens."""
        return self.decoder.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def about(self) -> dict[str, Any]:
        """The tokenizer's settings, as far as they are plain values, and its chat template."""
        settings = {
            name: value
            for name, value in self._tokenizer.init_kwargs.items()
            if isinstance(value, str | int | float) and not name.endswith(("_file", "_path"))
        }
        return {
            **settings,
            **self._tokenizer.special_tokens_map,
            "tokenizer_class": type(self._tokenizer).__name__,
            "chat_template": self.chat_template,
        }

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return [self.decoder.id_to_token(token) or "" for token in tokens]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_length(self, text: str, param: str) -> None:
        if len(text) > self._max_chars:
            raise RequestError(
                f"the prompt has {len(text)} characters, which cannot fit the model's "
                f"{self._max_tokens} tokens",
                param,
            )

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def read_template(path: str | None) -> str | None:
    """The chat template in a file.

    Raises:
        ConfigError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --chat_template {path}: {error}") from error


def _as_dict(message: Message) -> dict[str, Any]:
    """As templates expect it, the parts of its content joined by lines."""
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type not in ("text", "input_text", "output_text") or part.text is None:
                raise RequestError(
                    f"message content of type {part.type!r} is not supported; send text", "messages"
                )
        content = "\n".join(part.text or "" for part in content)
    found: dict[str, Any] = {**(message.model_extra or {})}
    found |= {"role": message.role, "content": content or ""}
    if "reasoning" in found:  # as vLLM answers
        found.setdefault("reasoning_content", found["reasoning"])
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [_call_as_dict(call) for call in message.tool_calls]
    return found


def _call_as_dict(call: ToolCall) -> dict[str, Any]:
    """With its arguments as an object, which templates write in the family's own way."""
    arguments: Any = call.function.arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise RequestError(
                f"the arguments of the call of {call.function.name[:100]!r} are no JSON object",
                "messages",
            )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
