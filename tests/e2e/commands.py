"""Servers and bootstrap peers as real processes, for tests that end, stop or stall them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Command:
    """A running `python -m planetserve.NAME`, with its output in files."""

    def __init__(self, folder: Path, name: str, *arguments: str):
        self.ready_file = folder / f"{name}-{len(list(folder.iterdir()))}.json"
        self.log = self.ready_file.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"planetserve.{name}", *arguments,
                 "--ready_file", str(self.ready_file)],
                env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> dict[str, Any]:
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        found: dict[str, Any] = json.loads(self.ready_file.read_text())
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def signal_all(self, number: int) -> None:
        """Signal the process and its libp2p daemon alike."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for each in (*process.children(), process):
                each.send_signal(number)

    def end(self) -> None:
        """Leave nothing behind, whatever state it is in."""
        if self.process.poll() is None:
            self.signal_all(signal.SIGKILL)
            self.process.wait()
