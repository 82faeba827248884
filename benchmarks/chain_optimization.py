"""Every table and picture of docs/chain_optimization.md, measured and drawn by one command.

    python benchmarks/chain_optimization.py [--sections NAME...] [--redraw]
    python benchmarks/chain_optimization.py --sections simulation --parts home_4

Each section (`benchmarks/chain/`) writes `results/chain_NAME.json`, its pictures
(`docs/images/chain_NAME_*.png`), and its tables into the page. `--redraw` makes tables and pictures
anew from the JSON files without measuring. `--parts` measures some parts of a section that has them
and keeps what is known of the others. `--quick --output FOLDER` runs the least of everything and
leaves the repository alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from chain import SECTIONS
from chain.output import fill_in, save, say
from common import RESULTS, environment, load

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these of one section")
    parser.add_argument("--redraw", action="store_true", help="do not measure again")
    parser.add_argument("--quick", action="store_true", help="least volume; needs --output")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write here instead")
    options = parser.parse_args(argv)
    if options.quick and options.output is None:
        parser.error("--quick would overwrite real results; give --output FOLDER")
    if options.parts:
        _check_parts(parser, options.sections, options.parts)
    results = options.output or RESULTS
    images = options.output or DOCS / "images"
    results.mkdir(parents=True, exist_ok=True)
    for name in options.sections:
        path = results / f"chain_{name}.json"
        section = importlib.import_module(SECTIONS[name])
        if not options.redraw:
            found = _measured(section, name, options.quick, options.parts)
            if options.parts and path.exists():
                known = json.loads(path.read_text())["result"]
                found["result"] = {**known, **found["result"]}
            path.write_text(json.dumps(found, indent=1) + "\n")
        result = json.loads(path.read_text())["result"]
        for figure_name, figure in section.figures(result).items():
            save(figure, images / f"chain_{name}_{figure_name}.png")
        tables = section.tables(result)
        for table_name, table in tables.items():
            sys.stdout.write(f"\n{name}.{table_name}\n\n{table}\n")
        if options.output is None:
            fill_in(DOCS / "chain_optimization.md", name, tables)
        say(f"\nwritten: {path.name}, its pictures and tables")


def _check_parts(parser: argparse.ArgumentParser, sections: list[str], parts: list[str]) -> None:
    """Parts are of one section, which has them."""
    if len(sections) != 1:
        parser.error("--parts needs one section")
    known = getattr(importlib.import_module(SECTIONS[sections[0]]), "PARTS", ())
    if not set(parts) <= set(known):
        parser.error(f"section {sections[0]} has these parts: {', '.join(known) or 'none'}")


def _measured(section: Any, name: str, quick: bool, parts: list[str] | None) -> dict[str, Any]:
    settings = environment()
    say(f"section {name}")
    started = time.perf_counter()
    result = section.measure(quick, parts) if parts else section.measure(quick)
    return {
        "benchmark": f"chain_optimization, section {name}",
        "environment": settings,
        "quick": quick,
        "seconds": round(time.perf_counter() - started, 1),
        "load_after": load(),
        "result": result,
    }


if __name__ == "__main__":
    main()
