"""Parses ranges of blocks (`"0:2,-2:"`), and splits a model between client and swarm.

A range is resolved with the number of blocks of the model, so a setting is checked when the model
is loaded, before the client contacts any peer. No torch, no network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from planetserve.config import ClientConfig
from planetserve.errors import ConfigError
from planetserve.types import BlockSpan, PeerId

_NUM_TRUSTED_ENDS = 2
_RANGE = re.compile(r"\s*(-?\d{1,5})?\s*:\s*(-?\d{1,5})?\s*")


@dataclass(frozen=True, slots=True)
class BlockSplit:
    """The swarm runs `remote`; the client runs the blocks `before` and `after` it."""

    before: BlockSpan | None
    remote: BlockSpan
    after: BlockSpan | None


def parse_ranges(option: str, text: str, num_blocks: int) -> tuple[BlockSpan, ...]:
    """Parse comma-separated `START:END`; a missing bound is the model's, a negative one counts from
    its end.

    Raises:
        ConfigError: the text is no such list or leaves the model; the message names `option`.
    """
    spans = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"{option}={text!r} is not a list of START:END, such as '0:2' or '0:2,-2:'"
            )
        start, end = (
            default if number is None else int(number) + (num_blocks if number[0] == "-" else 0)
            for number, default in zip(match.groups(), (0, num_blocks), strict=True)
        )
        if not 0 <= start < end <= num_blocks:
            raise ConfigError(
                f"{option}: {part.strip()!r} is empty or leaves the model, "
                f"which has blocks 0:{num_blocks}"
            )
        spans.append(BlockSpan(start, end))
    return tuple(spans)


def split_blocks(config: ClientConfig, num_blocks: int) -> BlockSplit:
    """Split the blocks of a model by `local_blocks`.

    Raises:
        ConfigError: the swarm's blocks are not contiguous, or there are none.
    """
    if config.local_blocks is None:
        return BlockSplit(None, BlockSpan(0, num_blocks), None)
    local = parse_ranges("local_blocks", config.local_blocks, num_blocks)
    remote = [block for block in range(num_blocks) if not any(block in span for span in local)]
    if not remote:
        raise ConfigError(
            f"local_blocks={config.local_blocks!r} are all blocks of the model, so no swarm is "
            "needed; load it with transformers.AutoModelForCausalLM, or leave some to the swarm"
        )
    start, end = remote[0], remote[-1] + 1
    if end - start != len(remote):
        raise ConfigError(
            f"local_blocks={config.local_blocks!r} leaves a gap between blocks that the swarm "
            "runs; only the first and the last blocks can be local, as in '0:1' or '0:2,-2:'"
        )
    return BlockSplit(
        BlockSpan(0, start) if start else None,
        BlockSpan(start, end),
        BlockSpan(end, num_blocks) if end < num_blocks else None,
    )


def trusted_spans(config: ClientConfig, num_blocks: int) -> Mapping[BlockSpan, frozenset[PeerId]]:
    """Spans that only the named servers may run; empty without `trusted_servers`.

    Raises:
        ConfigError: `trusted_blocks` is malformed or leaves the model.
    """
    if config.trusted_servers is None:
        return {}
    spans: tuple[BlockSpan, ...]
    if config.trusted_blocks is None:
        ends = min(_NUM_TRUSTED_ENDS, num_blocks)
        spans = (BlockSpan(0, ends), BlockSpan(num_blocks - ends, num_blocks))
    else:
        spans = parse_ranges("trusted_blocks", config.trusted_blocks, num_blocks)
    return dict.fromkeys(spans, frozenset(config.trusted_servers))
