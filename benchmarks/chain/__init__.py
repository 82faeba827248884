"""The sections of `benchmarks/chain_optimization.py`, one module each.

A section is a module in this folder with three functions:

- `measure(quick: bool) -> dict`: does the work and answers plain JSON values. `quick` asks for the
  smallest volume that still runs every line; it is for the test of the benchmark, not for numbers.
- `tables(result) -> dict[str, str]`: name -> Markdown (see `markdown` in `output.py`).
- `figures(result) -> dict[str, Figure]`: name -> matplotlib figure (`new_figure` in `output.py`).

`tables` and `figures` read nothing but what `measure` answered, so that `--redraw` can make them
again from the JSON file. To add a section: write the module, add it to `SECTIONS` below, and put
`<!-- table SECTION.TABLE -->` and `<!-- end -->` on lines of their own into the page
`docs/chain_optimization.md` wherever a table belongs; the command fills in what is between.
Pictures go to `docs/images/chain_SECTION_FIGURE.png`; link to them there. A measurement that takes
longer than some minutes should say on stdout what it is doing.
"""

from __future__ import annotations

SECTIONS = {
    "solvers": "chain.solvers",
    "quality": "chain.quality",
    "simulation": "chain.simulation",
    "wide_area": "chain.wide_area",
}
"""Name -> module, in the order in which they run and stand in the document."""
