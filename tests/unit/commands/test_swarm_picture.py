"""What `planetserve status` draws, at every width, with and without colours."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from planetserve.commands.swarm_picture import as_json, draw, draw_models
from planetserve.commands.swarm_reading import ModelStatus, ServerStatus, ranges
from planetserve.crypto.identity import Identity
from planetserve.types import BlockSpan, ServerInfo, ServerState

PEERS = [Identity.generate().peer_id for _ in range(4)]


def server(
    number: int, span: str, trouble: str = "", rtt_ms: float | None = 1.5, name: str = ""
) -> ServerStatus:
    info = ServerInfo(
        peer_id=PEERS[number], model="tiny", fingerprint="f" * 40, span=BlockSpan.parse(span),
        num_blocks=8, state=ServerState.ONLINE, dtype="float32", addresses=(),
        decode_ms_per_block=2.0, tokens_per_s_per_block=900.0, network_bytes_per_s=1e8,
        free_cache_tokens=4096, max_session_tokens=2048, version="1.2.3", hop_overhead_ms=0.5,
        public_name=name,
    )  # fmt: skip
    addresses = (("/ip4/192.0.2.1/tcp/1", True), ("/ip4/10.0.0.1/tcp/1", False))
    return ServerStatus(info, trouble, True, rtt_ms, addresses)


def model(*servers: ServerStatus, num_blocks: int = 8, **fields: Any) -> ModelStatus:
    return ModelStatus("demo", "tiny-0123456789ab", "f" * 40, num_blocks, servers, **fields)


def shown(status: ModelStatus, width: int = 100, **options: Any) -> str:
    with_addresses = options.pop("with_addresses", False)
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    console.print(draw(status, console, with_addresses=with_addresses))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def bars(text: str) -> dict[str, str]:
    """Name -> bar, of the lines that have one."""
    lines = (line.rstrip().partition("  ") for line in text.splitlines())
    return {
        name: bar.strip()
        for name, _, bar in lines
        if bar.strip() and not set(bar) - set("█░▒×#-?x ")
    }


def test_a_whole_swarm() -> None:
    text = shown(model(server(0, "0:3"), server(1, "3:8"), server(2, "3:8")))
    assert "every block is served; blocks 0:3 by one server only" in text
    found = bars(text)
    assert found["all"] == "█" * 32
    assert found[f"…{PEERS[0][-6:]}"] == "█" * 12
    line = next(line for line in text.splitlines() if " 0:3 " in line and "4,096" in line)
    # 3 blocks of 2 ms and an overhead of 0.5; 900 tokens/s through a block are 300 through three.
    assert line.split()[1:] == ["0:3", "6.5", "1.5", "4,096", "300", "float32", "1.2.3"]
    assert "usable" not in text


def test_missing_blocks_are_named_and_drawn() -> None:
    text = shown(model(server(0, "0:3"), server(1, "5:8")))
    assert "blocks 3:5: no server" in text
    assert "planetserve serve demo --block_indices 3:5" in text
    assert bars(text)["all"] == "█" * 12 + "×" * 8 + "█" * 12


def test_servers_that_do_not_answer_or_cannot_be_used() -> None:
    text = shown(
        model(server(0, "0:3"), server(1, "3:8", rtt_ms=None), server(2, "3:8", "draining"))
    )
    assert "blocks 3:8: announced, but no server answers from here" in text
    assert bars(text)["all"] == "█" * 12 + "▒" * 20
    assert f"…{PEERS[2][-6:]}: draining" in text
    assert "▒ does not answer  ░ not usable" in text


def test_one_unusable_server_hides_no_other() -> None:
    status = model(server(0, "0:8"), server(1, "0:8", rtt_ms=None), server(2, "2:4", "draining"))
    assert status.is_healthy
    assert (status.missing, status.unanswered, status.copies) == ([], [], [1] * 8)


@pytest.mark.parametrize("width", [20, 40, 80, 300])
@pytest.mark.parametrize("num_blocks", [1, 2, 8, 61, 126])
def test_bars_fit_every_terminal(width: int, num_blocks: int) -> None:
    middle = max(1, num_blocks // 2)
    text = shown(model(server(0, f"0:{middle}"), num_blocks=num_blocks), width)
    assert all(len(line) <= width for line in text.splitlines())
    found = bars(text)
    # What is missing is seen however many blocks share a cell, and where it is.
    assert ("×" in found["all"]) == (num_blocks > 1)
    assert found["all"].startswith("█")
    # Columns are left out rather than cut.
    assert f"0:{middle}" in text
    assert ("ms/token" in text) == (width >= 40)
    assert ("version" in text) == (width >= 80)


def test_no_colours_where_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    status = model(server(0, "0:3"))
    assert "\x1b[" in shown(status, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown(status, force_terminal=True, color_system="standard")
    assert "\x1b[3" not in plain
    assert "\x1b[9" not in plain
    assert "×" in plain


def test_ascii_where_the_terminal_has_nothing_else() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    console = Console(file=file, width=80)
    console.print(draw(model(server(0, "0:3"), server(1, "0:3", rtt_ms=None)), console))
    file.flush()
    text = file.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "#" * 12 + "x" * 20 in text


def test_a_strangers_words_do_not_reach_the_terminal() -> None:
    text = shown(model(server(0, "0:8", "requires what\x1b[2J this client does not know")))
    assert "\x1b" not in text
    assert "\\x1b[2J" in text


def test_names_that_are_long_or_wide_keep_the_bars_in_line() -> None:
    names = ["a" * 60, "安的机器", "b"]
    text = shown(model(*(server(i, "0:8", name=name) for i, name in enumerate(names))))
    lines = [line for line in text.splitlines() if "█" in line]
    assert len({cell_len(line.partition("█")[0]) for line in lines}) == 1
    assert "a" * 17 + "…" in text
    assert "安的机器" in text


def test_a_crowd_of_servers_of_a_huge_model_is_drawn_at_once() -> None:
    crowd = [server(i % 4, f"{i}:{i + 65000}") for i in range(500)]
    status = model(*crowd, num_blocks=65536)
    assert status.copies[:2] == [1, 2]
    assert shown(status).count("65536 blocks, 500 servers") == 1


def test_addresses_are_shown_on_demand_those_that_connect_first() -> None:
    status = model(server(0, "0:8"))
    assert "192.0.2.1" not in shown(status)
    text = shown(status, with_addresses=True)
    assert text.index("connects  /ip4/192.0.2.1") < text.index("does not  /ip4/10.0.0.1")
    assert "addresses" not in as_json(status)["servers"][0]
    assert as_json(status, with_addresses=True)["servers"][0]["addresses"][0]["connects"]


def test_json_says_the_same() -> None:
    document = json.loads(json.dumps(as_json(model(server(0, "0:3"), server(1, "5:8")))))
    assert document["missing"] == [[3, 5]]
    assert document["healthy"] is False
    assert document["copies"] == [1, 1, 1, 0, 0, 1, 1, 1]
    assert [one["rtt_ms"] for one in document["servers"]] == [1.5, 1.5]


def test_an_empty_swarm_says_what_else_there_is() -> None:
    text = shown(model(other_models=("llama-0123456789ab",)))
    assert "blocks 0:8: no server" in text
    assert "other models in this swarm: llama-0123456789ab" in text
    console = Console(file=io.StringIO(), width=80)
    console.print(draw_models([]))
    assert "no model" in console.file.getvalue()  # type: ignore[attr-defined]


def test_ranges() -> None:
    assert ranges([]) == []
    assert ranges([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 6), (7, 9)]
