"""What a fault did to a text: when the client noticed, when tokens came again, what was left.

`Witness` stands next to one `generate()` call. Rows are collected over a test run; `conftest.py`
prints them at its end.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import StoppingCriteria

JSON_VARIABLE = "PLANETSERVE_FAULTS_JSON"
"""Environment variable that names a file to write the rows to."""

_CLIENT_LOGGER = "planetserve.client.session_core"


@dataclass(frozen=True, slots=True)
class Row:
    """One fault at one moment of one text. Times in seconds; None where it was not noticed."""

    fault: str
    stage: str
    text: str
    detected_s: float | None
    recovered_s: float | None
    tokens_equal: bool
    pages_leaked: int


class Witness(StoppingCriteria, logging.Handler):
    """Notes when tokens come and when the client says that it changes its chain.

    Give it to `generate()` as a stopping criterion (it never stops); streamers do not work with
    beams. Times are those of `time.perf_counter`.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)
        self.tokens_s: list[float] = []
        self.changes_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def emit(self, record: logging.LogRecord) -> None:
        self.changes_s.append(time.perf_counter())

    @contextmanager
    def watching(self) -> Iterator[Witness]:
        """Listen to the client's log."""
        logger = logging.getLogger(_CLIENT_LOGGER)
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        try:
            yield self
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)

    def detected(self, struck_s: float) -> float | None:
        """Seconds from the fault until the client began to recover."""
        return next((time_s - struck_s for time_s in self.changes_s if time_s >= struck_s), None)

    def recovered(self, struck_s: float) -> float | None:
        """Seconds from the fault to the first token after the client noticed, if it did."""
        since_s = struck_s + (self.detected(struck_s) or 0.0)
        return next((time_s - struck_s for time_s in self.tokens_s if time_s >= since_s), None)


@dataclass
class FaultTable:
    """The rows of one test run."""

    rows: list[Row] = field(default_factory=list)

    def show(self, console: Console) -> None:
        """One line for each fault and stage, the worst of its rows."""
        table = Table("fault", "stage", "runs", "detected in", "recovered in", "worst",
                      "tokens equal", "pages leaked", title="faults")  # fmt: skip
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.fault, row.stage), []).append(row)
        for (fault, stage), rows in groups.items():
            recovered = [row.recovered_s for row in rows if row.recovered_s is not None]
            equal = sum(row.tokens_equal for row in rows)
            table.add_row(
                fault, stage, str(len(rows)),
                _seconds([row.detected_s for row in rows if row.detected_s is not None]),
                _seconds(recovered), f"{max(recovered):.2f} s" if recovered else "-",
                "yes" if equal == len(rows) else f"{equal} of {len(rows)}",
                str(sum(row.pages_leaked for row in rows)),
            )  # fmt: skip
        console.print(table)
        console.print("medians; in the table each row is all texts and hops of a fault and stage")

    def write(self) -> None:
        """The rows as JSON, if the environment asks for them."""
        path = os.environ.get(JSON_VARIABLE)
        if path:
            rows = [dataclasses.asdict(row) for row in self.rows]
            Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} s" if values else "-"
