"""`make demo` as a person runs it: equal tokens, exit codes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

TAG = "PLANETSERVE_TEST_DEMO"


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "planetserve.demo", *arguments],
        env={**os.environ, TAG: "1", "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def descendants() -> list[psutil.Process]:
    """Live processes that inherited the tag, wherever they hang in the process tree."""
    found = []
    for process in psutil.process_iter():
        try:
            tagged = TAG in process.environ() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if tagged:
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    left = descendants()
    for process in left:
        process.kill()
    assert left == []


@pytest.mark.timeout(300)
def test_any_prompt_gives_the_tokens_of_local_generation() -> None:
    process = start("--max_new_tokens", "12", PROMPT="The [word] class\nhas a méthode that returns")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "The [word] class\nhas a méthode that returns" in output
    assert [line.split()[1] for line in output.splitlines() if line.startswith("  blocks")] == [
        "0:3", "3:6", "6:8",
    ]  # fmt: skip
    equal = output.splitlines()[-1]
    assert equal.startswith("tokens equal local generation: yes (")
    count, total = equal.rpartition("(")[2].rstrip(")").split(" of ")
    assert 1 <= int(count) == int(total) <= 12


@pytest.mark.timeout(300)
def test_an_interrupt_ends_the_whole_swarm() -> None:
    process = start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("server 1"):
            break
    assert len(descendants()) >= 5
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


@pytest.mark.timeout(120)
def test_a_model_that_is_not_there_is_one_line() -> None:
    process = start("--model", "/nonexistent/model")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith("python -m planetserve.demo: error: ")
    assert errors.count("\n") == 1
