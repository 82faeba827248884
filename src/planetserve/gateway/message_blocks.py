"""A message as blocks that follow each other, each of one kind: reasoning, text, or a call.

Open Responses and Anthropic's API stream these as items that open, grow and close.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from planetserve.gateway.answers import Answer
from planetserve.gateway.messages import MessageDelta

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """One block as far as it has come."""

    index: int
    kind: Kind
    text: str = ""
    """Of a call, its arguments as JSON."""
    id: str = ""
    """Of a call."""
    name: str = ""
    """Of the tool that is called."""


Change = tuple[Literal["open", "grow", "close"], Block, str]
"""What has happened to a block, and the text that it has got."""


class Blocks:
    """Cuts what a message gets into blocks."""

    def __init__(self) -> None:
        self.done: list[Block] = []
        """All that have closed."""
        self._open: Block | None = None

    @classmethod
    def of(cls, answer: Answer) -> Blocks:
        """Of an answer that is whole."""
        blocks = cls()
        whole = MessageDelta(answer.content, answer.reasoning, tuple(answer.calls))
        for _ in (*blocks.add(whole), *blocks.end()):
            pass
        return blocks

    def add(self, delta: MessageDelta) -> Iterator[Change]:
        """What changes with this."""
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.content:
            yield from self._grow("text", delta.content)
        for call in delta.calls:
            yield from self._grow("call", call.arguments, call.id, call.name)

    def end(self) -> Iterator[Change]:
        """What changes when no more comes. There is at least one block."""
        if self._open is None and not self.done:
            yield from self._grow("text", "")
        yield from self._close()

    def _grow(
        self, kind: Kind, text: str, id_: str = "", name: str | None = None
    ) -> Iterator[Change]:
        block = self._open
        if block is None or block.kind != kind or name is not None:
            yield from self._close()
            block = self._open = Block(len(self.done), kind, "", id_, name or "")
            yield "open", block, ""
        if text:
            block.text += text
            yield "grow", block, text

    def _close(self) -> Iterator[Change]:
        block, self._open = self._open, None
        if block is not None:
            self.done.append(block)
            yield "close", block, ""
