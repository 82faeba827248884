"""How sections show results: Markdown tables, figures of one look, and where both are put."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PNG_BYTES = 300_000


def say(text: str) -> None:
    """A line of progress."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers align right, floats have three significant digits."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|---" + "|---:" * (len(header) - 1) + "|")
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def new_figure(num_axes: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * num_axes, 3.8), dpi=110, layout="constrained")
    axes = [figure.add_subplot(1, num_axes, i + 1) for i in range(num_axes)]
    for one in axes:
        one.grid(visible=True, which="major", alpha=0.3)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG.

    Raises:
        SystemExit: it is too large for a repository; draw fewer marks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    if path.stat().st_size > MAX_PNG_BYTES:
        raise SystemExit(f"{path.name} has {path.stat().st_size} bytes; draw fewer marks")


def fill_in(page: Path, section: str, tables: dict[str, str]) -> None:
    """Put tables between their marks in a Markdown page.

    Raises:
        SystemExit: a table has no marks there, or there are marks without a table.
    """
    text = page.read_text(encoding="utf-8")
    marked = set(re.findall(rf"<!-- table {section}\.(\w+) -->", text))
    if marked != set(tables):
        raise SystemExit(f"{page.name}: marks {sorted(marked)}, but tables {sorted(tables)}")
    for name, table in tables.items():
        pattern = rf"(<!-- table {section}\.{name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def _cell(cell: object) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return "" if cell is None else str(cell)
