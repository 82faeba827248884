"""Which share of downloads goes to models that can be served as published.

Reads the first table of docs/families.md, which `family_table.py` writes from what it has tried.

    python scripts/download_share.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
LARGE = 20.0
"""Parameters of a large model, in billions."""
SERVED = "served"
NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Published:
    """One line of the table: checkpoints of one class that are stored alike.

    Attributes:
        checkpoints: their names.
        size: billions of parameters, as 35B or 2-8B.
        model_type: of their configuration.
        stored: how their weights are stored.
        downloads_k: downloads in thousands; None if unknown.
        status: `SERVED`, `NOT_TRIED`, or that it is refused and why.
        instead: what can be served in the place of a refused one.
    """

    checkpoints: str
    size: str
    model_type: str
    stored: str
    downloads_k: int | None
    status: str
    instead: str

    def __str__(self) -> str:
        downloads = "" if self.downloads_k is None else f"{self.downloads_k:,}"
        cells = (self.checkpoints, self.size, self.model_type, self.stored, downloads, self.status)
        return f"| {' | '.join(cells)} | {self.instead} |"

    @property
    def is_large(self) -> bool:
        """Whether all of these have `LARGE` billion parameters or more."""
        found = re.match(r"E?([\d.]+)", self.size)
        return found is not None and float(found[1]) >= LARGE


def published(page: str) -> list[Published]:
    """The lines of the first table of a page."""
    table = page.partition("\n|---")[2].partition("\n\n")[0]
    rows = []
    for line in table.splitlines()[1:]:
        names, size, model_type, stored, downloads, status, instead = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        count = int(downloads.replace(",", "")) if downloads else None
        rows.append(Published(names, size, model_type, stored, count, status, instead))
    return rows


def share(rows: Sequence[Published]) -> float:
    """The part of the downloads that goes to what is served."""
    total = sum(row.downloads_k or 0 for row in rows)
    return sum(row.downloads_k or 0 for row in rows if row.status == SERVED) / total


def summary(rows: Sequence[Published]) -> str:
    """The shares, and what the rest is."""
    large = [row for row in rows if row.is_large]
    rest = sorted(
        (row for row in rows if row.status != SERVED and row.downloads_k),
        key=lambda row: -(row.downloads_k or 0),
    )
    total = sum(row.downloads_k or 0 for row in large)
    named = [
        f"{row.checkpoints}, {row.stored} ({100 * (row.downloads_k or 0) / total:.1f} %)"
        for row in rest
        if row.is_large and (row.downloads_k or 0) >= total / 1000
    ]
    return (
        f"{100 * share(rows):.1f} % of the downloads in this table go to checkpoints that are "
        f"served as published, and {100 * share(large):.1f} % of those of models with {LARGE:g} B "
        f"parameters and more. The rest of the latter: {'; '.join(named)}; and others below 0.1 % "
        "each."
    )


if __name__ == "__main__":
    print(summary(published(PAGE.read_text())))
