"""docs/families.md names every family that is tested, with the verdict the code gives."""

from __future__ import annotations

from pathlib import Path

from planetserve.testing.checkpoints import FAMILIES, REFUSED_FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_lists_every_family() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {row[0]: row[1] for row in rows} == {n: f.model_type for n, f in FAMILIES.items()}
    assert {row[0] for row in rows if row[2] == "refused"} == set(REFUSED_FAMILIES)
    assert {row[2] for row in rows} == {"ragged", "plain", "refused"}
