"""`make demo` installs in a few lines: what the installer says is kept, and shown if it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "quietly.py"

NOISE = """
import sys
for n in range(200):
    print("Collecting package", n)
    print("  Using cached package", n)
print("Building wheels for collected packages: x", file=sys.stderr)
print("Installing collected packages: many")
print("the last word")
sys.exit(int(sys.argv[1]))
"""


def run(log: Path, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NOISE, str(code)]
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(log), "--", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_hundreds_of_lines_become_a_few(tmp_path: Path) -> None:
    log = tmp_path / "folder" / "install.log"
    done = run(log, 0)
    assert done.returncode == 0
    assert 2 <= len(done.stdout.splitlines()) <= 4
    assert done.stderr == ""
    assert len(log.read_text().splitlines()) == 403


def test_a_failure_shows_the_end_of_the_log_and_where_it_is(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    done = run(log, 3)
    assert done.returncode == 3
    assert "the last word" in done.stderr
    assert str(log) in done.stderr
    assert len(done.stderr.splitlines()) < 40
