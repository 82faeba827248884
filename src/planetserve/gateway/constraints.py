"""Grammars that answers must follow: llguidance says which tokens may come next.

A grammar is compiled once, in a thread, within limits of size and time. Each answer has a matcher
of its own. Where the grammar leaves no choice, the tokens that must follow are known at once and
need no step of their own.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, grammar_from
from tokenizers import Tokenizer

from planetserve.gateway.errors import RequestError

_MAX_CHARS = 128 * 1024
_COMPILE_TIMEOUT_S = 10.0
_MAX_KEPT = 16
"""Compiled grammars that are kept for the next request."""
_MAX_SHOWN_CHARS = 300


@dataclass(frozen=True, slots=True)
class Format:
    """What an answer must be."""

    kind: Literal["schema", "regex", "choice", "grammar"]
    text: str
    """A JSON schema, a regular expression, a JSON list of strings, or Lark or GBNF."""
    param: str
    """The parameter of the request that asks for it."""

    @classmethod
    def of_schema(cls, schema: object, param: str) -> Format:
        """Of a JSON schema, as an object or as text."""
        return cls("schema", schema if isinstance(schema, str) else json.dumps(schema), param)

    def as_grammar(self) -> str:
        """In llguidance's notation. Documents of a schema have no white space between their parts,
        with which a weak model would go on for ever.

        Raises:
            ValueError: it is no schema or grammar.
        """
        if self.kind == "schema":
            return LLMatcher.grammar_from_json_schema(
                self.text, overrides={"whitespace_flexible": False}
            )
        return grammar_from(self.kind, self.text)


class Constraint:
    """One answer on its way through a grammar.

    Args:
        matcher: at the beginning of the grammar; nobody else uses it.
        reasoning_id: token that may come first instead, and begins reasoning that no grammar binds.
    """

    def __init__(self, matcher: LLMatcher, reasoning_id: int | None = None):
        self._matcher = matcher
        self._reasoning_id = reasoning_id
        self.is_active = True
        """Whether the next token is bound; not while the model reasons."""

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return self.is_active and self._matcher.is_stopped()

    def check(self) -> None:
        """Refuse to go on when the grammar has become too complex to follow.

        Raises:
            RequestError: it has.
        """
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot be followed: {_why(self._matcher)}")

    def allow(self, logits_V: torch.Tensor) -> None:
        """Leave only what may come next, in place. Changes nothing when the matcher has failed."""
        if not self.is_active or self._matcher.is_error():
            return
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=len(logits_V)).astype(bool)
        if self._reasoning_id is not None:
            allowed[self._reasoning_id] = True
        if not self._matcher.is_error():
            logits_V[torch.from_numpy(~allowed)] = -torch.inf

    def take(self, token: int) -> None:
        """Go on with a token."""
        if not self.is_active:
            return
        if token == self._reasoning_id:
            self.is_active = False
        else:
            self._matcher.consume_token(token)
        self._reasoning_id = None

    def forced(self) -> tuple[int, ...]:
        """Tokens that must follow, not yet taken."""
        if not self.is_active or self._matcher.is_stopped():
            return ()
        return tuple(self._matcher.compute_ff_tokens())


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: of the `tokenizers` library.
        vocab_size: of the model's logits.
        eos_ids: what may come where a grammar allows the end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planetserve-gateway-grammar")
        self._compiled: OrderedDict[Format, LLMatcher] = OrderedDict()
        self._guide: LLTokenizer | None = None

    async def compile(self, form: Format) -> LLMatcher:
        """A matcher at the beginning of what a format allows, to be copied for each answer.

        Raises:
            RequestError: the format is wrong, or too large.
        """
        param = form.param
        found = self._compiled.get(form)
        if found is None:
            if len(form.text) > _MAX_CHARS:
                raise RequestError(f"{param} is larger than {_MAX_CHARS} characters", param)
            try:
                async with asyncio.timeout(_COMPILE_TIMEOUT_S):
                    found = await asyncio.get_running_loop().run_in_executor(
                        self._thread, self._compile, form
                    )
            except TimeoutError:
                raise RequestError(f"{param} takes too long to compile", param) from None
            except (ValueError, RecursionError) as error:
                why = str(error)[:_MAX_SHOWN_CHARS]
                raise RequestError(f"{param} is not usable: {why}", param) from error
            if found.is_error():
                raise RequestError(f"{param} is not usable: {_why(found)}", param)
            self._compiled[form] = found
            if len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(form)
        return found

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, form: Format) -> LLMatcher:
        grammar = form.as_grammar()
        if self._guide is None:  # takes seconds for a large vocabulary; not everybody needs it
            self._guide = LLTokenizer(
                self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=self._eos_ids or None
            )
        return LLMatcher(self._guide, grammar, log_level=0)


def _why(matcher: LLMatcher) -> str:
    return matcher.get_error().splitlines()[0][:_MAX_SHOWN_CHARS]
