"""docs/families.md names what is tested, with the verdict that the code gives."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planetserve.check.trial import try_batching
from planetserve.model.checkpoint import Checkpoint
from planetserve.testing.checkpoints import (
    FAMILIES,
    REFUSED_FAMILIES,
    SERVABLE_FAMILIES,
    make_tiny_checkpoint,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    """The modules `family_table` and `download_share`."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("family_table"), importlib.import_module("download_share")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def rows() -> list[list[str]]:
    """The cells of the table of classes."""
    classes = PAGE.read_text().partition("## Classes")[2]
    lines = [line for line in classes.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_family() -> None:
    assert {row[0]: row[1] for row in rows()} == {n: f.model_type for n, f in FAMILIES.items()}
    assert {row[0] for row in rows() if row[2] == "refused"} == set(REFUSED_FAMILIES)


def test_published_checkpoints_have_the_status_that_the_code_gives(
    scripts: tuple[Any, Any],
) -> None:
    family_table, download_share = scripts
    with family_table.PUBLISHED.open(newline="") as file:
        sources = list(csv.DictReader(file))
    found = download_share.published(PAGE.read_text())
    assert [row.checkpoints for row in found] == [source["checkpoints"] for source in sources]
    for row, source in zip(found, sources, strict=True):
        reason = family_table.why_refused(source["type"], source["family"], source["stored"])
        if reason is not None:
            assert row.status == f"refused: {reason}"
        else:
            tried = source["family"] in SERVABLE_FAMILIES
            assert row.status == (download_share.SERVED if tried else download_share.NOT_TRIED)
        assert bool(row.instead) == (row.status != download_share.SERVED)


def test_the_page_says_which_share_of_downloads_is_served(scripts: tuple[Any, Any]) -> None:
    _, download_share = scripts
    page = PAGE.read_text()
    assert download_share.summary(download_share.published(page)) in page
    half = [
        download_share.Published("a", "30-40B", "x", "bf16", 100, "served", ""),
        download_share.Published("b", "2B", "x", "bf16", 900, "served", ""),
        download_share.Published("c", "E2B", "x", "bf16", 700, "refused: why", "a"),
        download_share.Published("d", "200B", "x", "fp8", 300, "refused: why", "a"),
    ]
    assert download_share.share(half) == 0.5
    assert "25.0 % of those of models with 20 B" in download_share.summary(half)
    assert "d, fp8 (75.0 %)" in download_share.summary(half)


@pytest.mark.parametrize("family", SERVABLE_FAMILIES)
def test_the_page_says_how_sessions_share_passes(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(tmp_path, family)))
    assert try_batching(checkpoint).way == {row[0]: row[2] for row in rows()}[family]
