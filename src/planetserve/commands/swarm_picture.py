"""A swarm as a picture for a terminal, and as JSON.

Each server is a bar over the model's blocks, as the health page of Petals drew it. What the picture
says by colour it also says by shape or in words: colours may be off, and output may go into a pipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from planetserve.client.planning.chain_planner import spans_text
from planetserve.commands.swarm_reading import ModelStatus, ServerStatus, ranges
from planetserve.errors import printable
from planetserve.plan.report import short_name

JSON_VERSION = 1
_MAX_CELLS_PER_BLOCK = 4
_NAME_CHARS = 18
_MAX_NOTES = 8

_SERVED, _UNUSABLE, _SILENT, _MISSING = "█", "░", "▒", "×"
_ASCII = {_SERVED: "#", _UNUSABLE: "-", _SILENT: "?", _MISSING: "x"}


def draw(status: ModelStatus, console: Console, *, with_addresses: bool = False) -> RenderableType:
    """The picture of one model, as wide as the console."""
    parts: list[RenderableType] = [_heading(status), *_health(status), Text()]
    parts += [_bars(status, console)]
    if status.servers:
        parts += [Text(), _table(status, console.width)]
        parts += _notes(status)
        if with_addresses:
            parts += [Text(), *_addresses(status)]
    if not status.servers and status.other_models:
        parts += [Text(f"other models in this swarm: {', '.join(status.other_models[:5])}")]
    return Group(*parts)


def draw_models(models: Sequence[ModelStatus]) -> RenderableType:
    """The models of a swarm, one on a line."""
    if not models:
        return Text("the directory lists no model: no server has joined this swarm")
    table = Table(box=None, pad_edge=False)
    for name in ("model", "blocks", "servers", "health"):
        table.add_column(name, overflow="fold", justify="left")
    for one in models:
        health = "every block is served"
        if not one.is_healthy:
            health = f"{spans_text(one.missing)} missing"
        table.add_row(
            Text(printable(one.prefix)), str(one.num_blocks), str(len(one.servers)),
            Text(health, style="green" if one.is_healthy else "bold red"),
        )  # fmt: skip
    return table


def as_json(status: ModelStatus, *, with_addresses: bool = False) -> dict[str, Any]:
    """One model for programs. docs/commands.md describes it."""
    return {
        "version": JSON_VERSION,
        "model": status.name,
        "prefix": status.prefix,
        "fingerprint": status.fingerprint,
        "num_blocks": status.num_blocks,
        "healthy": status.is_healthy,
        "missing": status.missing,
        "unanswered": status.unanswered,
        "copies": status.copies,
        "servers": [_server_json(server, with_addresses) for server in status.servers],
        "other_models": status.other_models,
    }


def models_json(models: Sequence[ModelStatus]) -> dict[str, Any]:
    """The models of a swarm for programs."""
    return {
        "version": JSON_VERSION,
        "models": [
            {
                "prefix": one.prefix,
                "fingerprint": one.fingerprint,
                "num_blocks": one.num_blocks,
                "servers": len(one.servers),
                "healthy": one.is_healthy,
                "missing": one.missing,
            }
            for one in models
        ],
    }


def _server_json(server: ServerStatus, with_addresses: bool) -> dict[str, Any]:
    info = server.info
    found: dict[str, Any] = {
        "peer_id": info.peer_id,
        "public_name": info.public_name,
        "start": info.span.start,
        "end": info.span.end,
        "state": info.state.value,
        "trouble": server.trouble,
        "answers": server.rtt_ms is not None if server.was_asked else None,
        "rtt_ms": server.rtt_ms,
        "ms_per_token": server.ms_per_token,
        "tokens_per_s": server.tokens_per_s,
        "free_cache_tokens": info.free_cache_tokens,
        "max_session_tokens": info.max_session_tokens,
        "dtype": info.dtype,
        "quant_type": info.quant_type,
        "planetserve": info.version,
    }
    if with_addresses:
        found["addresses"] = [
            {"address": text, "connects": connects} for text, connects in server.addresses
        ]
    return found


def _heading(status: ModelStatus) -> Text:
    text = Text(printable(status.name), style="bold")
    if status.name != status.prefix:
        text.append(f"  {printable(status.prefix)}", style="not bold dim")
    number = len(status.servers)
    words = f"  {status.num_blocks} blocks, {number} server{'' if number == 1 else 's'}"
    return text.append(words, style="not bold")


def _health(status: ModelStatus) -> list[Text]:
    if status.is_healthy:
        least = min(status.copies)
        single = ranges(block for block, number in enumerate(status.copies) if number == 1)
        text = Text("every block is served", style="bold green")
        words = f", each by at least {least} servers" if least > 1 else f"; {_single(single)}"
        if max(status.copies) == 1:
            words = ", each by one server"
        return [text.append(words, style="not bold default")]
    lines = []
    if status.missing:
        lines.append(Text(f"{spans_text(status.missing)}: no server", style="bold red"))
        start, end = status.missing[0]
        lines.append(
            Text(
                f"  start one: planetserve serve {_shown_model(status)} --block_indices "
                f"{start}:{end} --initial_peers ..."
            )
        )
    if status.unanswered:
        words = "announced, but no server answers from here"
        lines.append(Text(f"{spans_text(status.unanswered)}: {words}", style="bold red"))
    return lines


def _single(spans: Sequence[tuple[int, int]]) -> str:
    if len(spans) > 4:
        return "many of them by one server only"
    return f"{spans_text(spans)} by one server only"


def _shown_model(status: ModelStatus) -> str:
    """What to give to `serve`, which needs files and no name of the directory."""
    return "MODEL" if status.name == status.prefix else printable(status.name)


class _Scale:
    """Blocks to character cells: several cells for a block, or several blocks in a cell."""

    def __init__(self, num_blocks: int, room: int):
        self.num_blocks = num_blocks
        per_block = min(_MAX_CELLS_PER_BLOCK, room // num_blocks)
        self.num_cells = num_blocks * per_block if per_block else max(1, min(room, num_blocks))

    def blocks(self, cell: int) -> range:
        """The blocks that a cell shows."""
        first = cell * self.num_blocks // self.num_cells
        end = -(-(cell + 1) * self.num_blocks // self.num_cells)
        return range(first, end)

    def cell(self, block: int) -> int:
        """The first cell of a block."""
        return -(-block * self.num_cells // self.num_blocks)


def _bars(status: ModelStatus, console: Console) -> Text:
    """The axis, all blocks, and one bar per server."""
    names = [_name(server) for server in status.servers]
    width = max(map(cell_len, [*names, "all"]))
    scale = _Scale(status.num_blocks, max(8, console.width - width - 4))
    glyphs = dict(_ASCII) if _is_plain(console) else {}
    # A bar that is wrapped would be no picture.
    text = Text(no_wrap=True, overflow="crop")
    text.append(f"{'':{width}}  {_axis(scale)}\n", style="dim")
    text.append(f"{'all':<{width}}  ", style="bold")
    copies, silent = status.copies, {b for a, z in status.unanswered for b in range(a, z)}
    for cell in range(scale.num_cells):
        blocks = scale.blocks(cell)
        glyph, style = _SERVED, "green"
        if any(not copies[block] for block in blocks):
            is_silent = all(copies[block] or block in silent for block in blocks)
            glyph, style = (_SILENT if is_silent else _MISSING), "bold red"
        text.append(glyphs.get(glyph, glyph), style=style)
    for server, name in zip(status.servers, names, strict=True):
        text.append(f"\n{set_cell_size(name, width)}  ")
        glyph, style = _SERVED, "cyan"
        if server.trouble:
            glyph, style = _UNUSABLE, "yellow"
        elif not server.answers:
            glyph, style = _SILENT, "red"
        for cell in range(scale.num_cells):
            blocks, span = scale.blocks(cell), server.info.span
            is_held = span.start < blocks.stop and blocks.start < span.end
            text.append(glyphs.get(glyph, glyph) if is_held else " ", style=style)
    used = _legend(status)
    if used:
        shown = (f"{glyphs.get(glyph, glyph)} {words}" for glyph, words in used)
        text.append(f"\n{'':{width}}  {'  '.join(shown)}", style="dim")
    return text


def _legend(status: ModelStatus) -> list[tuple[str, str]]:
    found = []
    if status.missing:
        found.append((_MISSING, "no server"))
    if any(not server.answers and not server.trouble for server in status.servers):
        found.append((_SILENT, "does not answer"))
    if any(server.trouble for server in status.servers):
        found.append((_UNUSABLE, "not usable"))
    return found


def _axis(scale: _Scale) -> str:
    """Numbers of blocks where there is room for them."""
    widest = len(str(scale.num_blocks)) + 2
    steps = (base * 10**power for power in range(6) for base in (1, 2, 4, 5, 8))
    step = next(
        (s for s in sorted(steps) if scale.num_cells * s >= widest * scale.num_blocks),
        scale.num_blocks,
    )
    line = ""
    for block in range(0, scale.num_blocks, step):
        line = f"{line:<{scale.cell(block)}}{block}"
    end = str(scale.num_blocks)
    return f"{line:<{scale.num_cells}}{end}" if len(line) < scale.num_cells else line


_COLUMNS = ("blocks", "ms/token", "RTT ms", "free cache", "tokens/s", "weights", "version")
"""Of the table, those first that a narrow terminal shows."""
_LEFT_COLUMNS = ("blocks", "weights", "version")


def _table(status: ModelStatus, width: int) -> Table:
    """Numbers of every server, as many columns as there is room for."""
    rows = [_cells(server) for server in status.servers]
    used = max(cell_len(_name(server)) for server in status.servers) + 1
    shown = []
    for name in _COLUMNS:
        used += 1 + max(len(name), *(len(row[name]) for row in rows))
        if used <= width:
            shown.append(name)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("server", overflow="ellipsis", no_wrap=True)
    for name in shown:
        table.add_column(name, no_wrap=True, justify="left" if name in _LEFT_COLUMNS else "right")
    for server, row in zip(status.servers, rows, strict=True):
        style = "yellow" if server.trouble else "red" if not server.answers else ""
        table.add_row(Text(_name(server)), *(Text(row[name]) for name in shown), style=style)
    return table


def _cells(server: ServerStatus) -> dict[str, str]:
    info = server.info
    rtt = "none" if server.was_asked else ""
    return {
        "blocks": str(info.span),
        "ms/token": f"{server.ms_per_token:.1f}",
        "RTT ms": rtt if server.rtt_ms is None else f"{server.rtt_ms:.1f}",
        "free cache": f"{info.free_cache_tokens:,}",
        "tokens/s": f"{server.tokens_per_s:.0f}",
        "weights": printable(info.dtype if info.quant_type == "none" else info.quant_type),
        "version": printable(info.version),
    }


def _notes(status: ModelStatus) -> list[Text]:
    """A line for each server that cannot be used."""
    notes = []
    for server in status.servers:
        why = server.trouble
        if not why and not server.answers:
            why = "does not answer from here; it may have gone, or its port is closed"
        if why:
            notes.append(Text(f"{_name(server)}: {printable(why)}", style="yellow"))
    hidden = len(notes) - _MAX_NOTES
    return notes[:_MAX_NOTES] + ([Text(f"and {hidden} more")] if hidden > 0 else [])


def _addresses(status: ModelStatus) -> list[Text]:
    lines = []
    for server in status.servers:
        lines.append(Text(f"{_name(server)}:"))
        for address, connects in server.addresses:
            mark = "connects" if connects else "does not"
            style = "" if connects else "dim"
            # In one piece, to be copied.
            text = f"  {mark}  {printable(address)}"
            lines.append(Text(text, style=style, no_wrap=True, overflow="ignore"))
    return lines


def _name(server: ServerStatus) -> str:
    """What people call the server, or the end of its peer id."""
    name = printable(server.info.public_name) or short_name(server.info.peer_id)
    return name if cell_len(name) <= _NAME_CHARS else set_cell_size(name, _NAME_CHARS - 1) + "…"


def _is_plain(console: Console) -> bool:
    """Whether only ASCII can be printed."""
    return not console.encoding.lower().startswith("utf")
