"""Block ranges as people type them, and what they leave to the swarm."""

from __future__ import annotations

import pytest

from planetserve.client.planning.block_ranges import (
    BlockSplit,
    parse_ranges,
    split_blocks,
    trusted_spans,
)
from planetserve.config import ClientConfig, from_mapping
from planetserve.errors import ConfigError
from planetserve.types import BlockSpan


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("0:2", [(0, 2)]),
        (":2", [(0, 2)]),
        ("-2:", [(6, 8)]),
        ("0:2,-2:", [(0, 2), (6, 8)]),
        (" 0 : 1 , 7:8 ", [(0, 1), (7, 8)]),
        ("-3:-1", [(5, 7)]),
        (":", [(0, 8)]),
    ],
)
def test_ranges_that_are_read(text: str, spans: list[tuple[int, int]]) -> None:
    assert parse_ranges("x", text, 8) == tuple(BlockSpan(*span) for span in spans)


@pytest.mark.parametrize("text", ["", "3", "0:2,", "0-2", "a:b", "0:2:4", "0:999999", "--1:"])
def test_text_that_is_no_range(text: str) -> None:
    with pytest.raises(ConfigError, match="x=.* is not a list of START:END"):
        parse_ranges("x", text, 8)


@pytest.mark.parametrize("text", ["0:9", "8:", "-9:", "3:3", "5:2", "0:2,7:9"])
def test_ranges_that_leave_the_model(text: str) -> None:
    with pytest.raises(ConfigError, match="which has blocks 0:8"):
        parse_ranges("x", text, 8)


@pytest.mark.parametrize(
    ("text", "before", "remote", "after"),
    [
        (None, None, (0, 8), None),
        ("0:1", (0, 1), (1, 8), None),
        ("-2:", None, (0, 6), (6, 8)),
        ("0:2,7:8", (0, 2), (2, 7), (7, 8)),
        ("7:8,0:1,1:3", (0, 3), (3, 7), (7, 8)),
    ],
)
def test_what_is_left_to_the_swarm(
    text: str | None,
    before: tuple[int, int] | None,
    remote: tuple[int, int],
    after: tuple[int, int] | None,
) -> None:
    expected = BlockSplit(
        BlockSpan(*before) if before else None,
        BlockSpan(*remote),
        BlockSpan(*after) if after else None,
    )
    assert split_blocks(ClientConfig(local_blocks=text), 8) == expected


@pytest.mark.parametrize("text", ["3:4", "0:1,3:4", "1:2,-1:"])
def test_blocks_in_the_middle_cannot_be_local(text: str) -> None:
    with pytest.raises(ConfigError, match="only the first and the last blocks"):
        split_blocks(ClientConfig(local_blocks=text), 8)


@pytest.mark.parametrize("text", ["0:8", "0:4,4:8", ":"])
def test_a_model_that_is_all_local_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no swarm is needed"):
        split_blocks(ClientConfig(local_blocks=text), 8)


@pytest.mark.parametrize(("num_blocks", "ends"), [(8, [(0, 2), (6, 8)]), (1, [(0, 1)])])
def test_by_default_the_ends_are_trusted(num_blocks: int, ends: list[tuple[int, int]]) -> None:
    config = from_mapping(ClientConfig, {"trusted_servers": ["a", "b"]})
    names = frozenset({"a", "b"})
    assert trusted_spans(config, num_blocks) == {BlockSpan(*end): names for end in ends}


def test_nothing_is_trusted_specially_without_trusted_servers() -> None:
    assert trusted_spans(ClientConfig(), 8) == {}
    with pytest.raises(ConfigError, match="name the servers as well"):
        ClientConfig(trusted_blocks="0:2")
