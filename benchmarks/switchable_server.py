"""`run_server` for `crypto_cost.py`: protection can be switched off, and passes are timed.

SIGUSR1 switches between sealed and plain edges for sessions that are opened from then on. SIGUSR2
writes what has been measured since the last time to the folder that the environment variable
names, as `PID.json`: how long each pass through the blocks took, in seconds.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import plain_edges

from planetserve import cli, run_server

FOLDER_VARIABLE = "PLANETSERVE_BENCH_FOLDER"


def main() -> None:
    from planetserve.engine.span_runner import SpanRunner

    folder = Path(os.environ[FOLDER_VARIABLE])
    passes_s: list[float] = []
    forward = SpanRunner.forward

    def timed(runner: SpanRunner, *args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        output = forward(runner, *args, **kwargs)
        passes_s.append(time.perf_counter() - started_s)
        return output

    kind = "sealed"

    def switch(*_: object) -> None:
        nonlocal kind
        kind = "plain" if kind == "sealed" else "sealed"
        plain_edges.use(kind)

    def write(*_: object) -> None:
        part = folder / f"{os.getpid()}.part"
        part.write_text(json.dumps(passes_s))
        passes_s.clear()
        part.rename(part.with_suffix(".json"))

    SpanRunner.forward = timed  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, switch)
    signal.signal(signal.SIGUSR2, write)
    run_server.main()


if __name__ == "__main__":
    cli.run("switchable_server", main)
