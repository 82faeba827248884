"""The demo's processes: started, waited for, and gone at the end whatever they do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from planetserve import demo
from planetserve.demo import Children, parse, split_blocks
from planetserve.errors import ConfigError, PlanetServeError

WRITE_READY_FILE = """
import json, os, signal, subprocess, sys, time
def ready(**contents):
    with open(sys.argv[-1] + ".new", "w") as file:
        json.dump(contents, file)
    os.replace(sys.argv[-1] + ".new", sys.argv[-1])
"""
SCRIPTS = {
    "ready": "ready(peer_id='x'); time.sleep(600)",
    "fails": "print('line one'); sys.exit('no such model')",
    "stubborn": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "ready(inner=inner.pid); time.sleep(600)",
}


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    """Children whose modules are the scripts above."""
    for name, text in SCRIPTS.items():
        (tmp_path / f"demo_test_{name}.py").write_text(WRITE_READY_FILE + text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = Children(tmp_path)
    yield made
    made.stop()


def gone(pid: int) -> bool:
    """Whether a process has ended, as far as it can be told without being its parent."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_a_child_is_ready_when_its_file_is_there(children: Children) -> None:
    child = children.start("it", "demo_test_ready")
    assert child.wait_ready() == {"peer_id": "x"}
    assert child.process.poll() is None
    children.stop()
    assert child.process.returncode == -signal.SIGTERM


def test_a_child_that_fails_shows_the_end_of_its_log(
    children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlanetServeError, match="server 2 did not start: exited with 1"):
        children.start("server 2", "demo_test_fails").wait_ready()
    assert "line one\nno such model\n" in capsys.readouterr().err


def test_a_child_that_does_not_listen_is_killed_with_its_own_children(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.2)
    child = children.start("it", "demo_test_stubborn")
    inner = child.wait_ready()["inner"]
    children.stop()
    assert child.process.returncode == -signal.SIGKILL
    while not gone(inner):
        time.sleep(0.02)


def test_an_interrupt_while_stopping_waits_until_all_have_stopped(children: Children) -> None:
    child = children.start("it", "demo_test_ready")
    child.wait_ready()

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGCHLD, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            children.stop()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert child.process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [
        (8, ["0:3", "3:6", "6:8"]),
        (9, ["0:3", "3:6", "6:9"]),
        (3, ["0:1", "1:2", "2:3"]),
        (2, ["0:1", "1:2"]),
        (1, ["0:1"]),
    ],
)
def test_blocks_are_split_without_gap(num_blocks: int, expected: list[str]) -> None:
    assert [str(span) for span in split_blocks(num_blocks, 3)] == expected


def test_the_prompt_comes_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPT", "")
    assert parse([]).prompt == demo.DEFAULT_PROMPT
    monkeypatch.setenv("PROMPT", "Once upon")
    assert parse([]).prompt == "Once upon"
    assert parse(["--prompt", "A time"]).prompt == "A time"


@pytest.mark.parametrize("line", [["--prompt", " "], ["--max_new_tokens", "0"]])
def test_nothing_to_do_is_an_error(line: list[str]) -> None:
    with pytest.raises(ConfigError, match="give a --prompt"):
        parse(line)
