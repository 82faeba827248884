"""Tokens to text as they come: incremental decoding, and stop strings that never leak in part.

`tokenizers`' own stream decoder gives each piece of text once its characters are whole. What could
be the beginning of a stop string is held back until the next tokens have decided.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT = 8
"""Tokens of the prompt that decide how the first token is written, with a space in front or not."""


class TokenDecoder:
    """Decodes one text token by token.

    Args:
        tokenizer: shared by all texts; only read.
        prompt_ids: what the text goes on from.
        skip_special_tokens: leave out special tokens.
        kept_ids: special tokens that are written all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool,
        kept_ids: frozenset[int] = frozenset(),
    ):
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens and not kept_ids
        self._hidden_ids: frozenset[int] = frozenset()
        if skip_special_tokens and kept_ids:
            self._hidden_ids = special_ids(tokenizer) - kept_ids
        self._stream = DecodeStream(list(prompt_ids[-_CONTEXT:]), self._skips)

    def add(self, token: int) -> str:
        """The text that is whole with this token; may be empty."""
        if token in self._hidden_ids:
            return ""
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - tokenizers raises nothing narrower
            # Some decoders rewrite what came before, which the stream does not allow: begin anew.
            self._stream = DecodeStream([], self._skips)
            return self._stream.step(self._tokenizer, token) or ""


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that are no text."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, about in added.items() if about.special)


class StopStrings:
    """Passes text on up to the first of some strings.

    Args:
        strings: none of them empty.
        include: pass on the string that was found, too.
    """

    def __init__(self, strings: Sequence[str], include: bool = False):
        self._strings = tuple(strings)
        self._include = include
        self._most_held = max(map(len, strings), default=1) - 1
        self._held = ""

    def add(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """What can be passed on now, and the stop string that was found."""
        if not self._strings:
            return text, None
        text = self._held + text
        self._held = ""
        found = self._find(text) if may_stop else None
        if found is not None:
            place, string = found
            return text[: place + len(string) if self._include else place], string
        num_held = self._unsure(text) if may_stop else 0
        if num_held:
            self._held = text[-num_held:]
            text = text[:-num_held]
        return text, None

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        places = ((text.find(string), string) for string in self._strings)
        return min((place for place in places if place[0] >= 0), default=None)

    def _unsure(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(self._most_held, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
