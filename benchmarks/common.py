"""What every benchmark records and how it shows it: machine, commit, medians, tables, JSON files.

A result file states where its numbers come from, so that they can be measured again elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """The machine, the software and the commit that numbers were measured on."""
    import torch
    import transformers

    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "../src")),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_before": load(),
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes: other work makes every number here worse."""
    return [round(value, 2) for value in os.getloadavg()]


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def cpu_seconds() -> float:
    """Processor time so far of this process and its descendants, libp2p daemons included.

    Unlike rates, it hardly depends on what else the machine is doing.
    """
    import psutil

    total = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def median(values: Iterable[float]) -> float:
    """The median; not a number if there are none."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def percentile(values: Iterable[float], percent: int) -> float:
    """A percentile by nearest rank; not a number if there are no values."""
    found = sorted(values)
    if not found:
        return float("nan")
    return found[min(len(found) - 1, round(percent / 100 * (len(found) - 1)))]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under a header, columns aligned, floats with a sensible number of digits."""
    lines = [list(header), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return "" if cell is None else str(cell)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(RESULTS.parent), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
