"""Run a command that says a lot: what it says goes to a log, and one line tells where it is.

    python scripts/quietly.py LOG -- COMMAND ...

On a terminal the line is rewritten, elsewhere there is one for each stage of pip. If the command
fails, the end of the log is shown, and the exit code is the command's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

_SHOWN_ON_FAILURE = 25
_STAGES = {
    "Collecting ": "looking up and downloading packages",
    "Building wheel": "building what comes as source",
    "Installing collected": "installing packages; nothing is heard of this for a while",
}
"""Beginning of a line of pip's -> what it does from then on."""


def main(log_path: str, command: list[str]) -> int:
    """Run `command`; its exit code."""
    last: deque[str] = deque(maxlen=_SHOWN_ON_FAILURE)
    progress = _Progress()
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    with Path(log_path).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        try:
            for line in process.stdout or ():
                log.write(line)
                last.append(line)
                progress.see(line.strip())
        except KeyboardInterrupt:
            pass  # the command has got it too, and says goodbye
        code = process.wait()
    progress.end()
    if code:
        sys.stderr.write("".join(last))
        sys.stderr.write(f"failed with exit code {code}; everything it said is in {log_path}\n")
    return code


class _Progress:
    """The line that tells where the command is."""

    def __init__(self) -> None:
        self._rewrites = sys.stdout.isatty()
        self._width = shutil.get_terminal_size().columns - 1
        self._stage = ""

    def see(self, line: str) -> None:
        """Show one line of output, or the stage that it begins."""
        if self._rewrites and line:
            text = line if line.isprintable() else ascii(line)
            sys.stdout.write(f"\r\x1b[K{text[: self._width]}")
            sys.stdout.flush()
            return
        stage = next((_STAGES[start] for start in _STAGES if line.startswith(start)), "")
        if stage not in ("", self._stage):
            self._stage = stage
            print(f"  {stage}", flush=True)

    def end(self) -> None:
        """Leave the terminal's line empty."""
        if self._rewrites:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[3:]))
