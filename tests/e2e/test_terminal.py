"""At a real terminal: Ctrl-C, twice, a closed window, a notebook's interrupt; nothing is left."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from terminals import CTRL_C, Terminal
from transformers.generation.streamers import BaseStreamer

from planetserve import AutoDistributedModelForCausalLM
from planetserve.testing.swarm import LocalSwarm

pytestmark = pytest.mark.timeout(120)

LOOPBACK = ("--host_maddrs", "/ip4/127.0.0.1/tcp/0")


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.destroy()


def serve(terminals: list[Terminal], folder: Path, model: Path, *more: str) -> Terminal:
    ready = folder / "ready.json"
    terminal = Terminal(
        "-m", "planetserve.run_server", str(model), "--block_indices", "0:6", "--new_swarm",
        *LOOPBACK, "--ready_file", str(ready), "--num_threads", "1", *more,
    )  # fmt: skip
    terminals.append(terminal)
    return terminal


def addresses(terminal: Terminal, folder: Path) -> list[str]:
    terminal.wait_for("To use it from Python")
    while not (folder / "ready.json").exists():
        time.sleep(0.02)
    found: list[str] = json.loads((folder / "ready.json").read_text())["addresses"]
    return found


class _Press(BaseStreamer):
    """Presses a key after some tokens, and lets the text take a while."""

    def __init__(self, terminal: Terminal):
        self.terminal, self.num_tokens = terminal, 0

    def put(self, value: torch.Tensor) -> None:
        self.num_tokens += 1
        if self.num_tokens == 4:
            self.terminal.press(CTRL_C)
            self.terminal.wait_for("draining")

    def end(self) -> None:
        return


def test_ctrl_c_drains_a_server_while_its_only_text_finishes(
    tmp_path: Path, llama_folder: Path, local: Any, prompt: torch.Tensor, terminals: list[Terminal]
) -> None:
    terminal = serve(terminals, tmp_path, llama_folder)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    with AutoDistributedModelForCausalLM.from_pretrained(
        str(llama_folder), initial_peers=addresses(terminal, tmp_path), max_retries=0
    ) as model:
        got = model.generate(prompt, **options, streamer=_Press(terminal))
    assert torch.equal(got, local.generate(prompt, **options))
    assert terminal.end() == 0
    assert "left the swarm" in terminal.output


def test_a_second_ctrl_c_ends_the_drain(
    tmp_path: Path, llama_folder: Path, prompt: torch.Tensor, terminals: list[Terminal]
) -> None:
    terminal = serve(terminals, tmp_path, llama_folder)
    with (
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=addresses(terminal, tmp_path)
        ) as model,
        model.inference_session(max_length=40),
    ):
        model.generate(prompt, max_new_tokens=2)
        terminal.press(CTRL_C)
        terminal.wait_for("draining")
        assert "interrupt again to leave at once" in terminal.output
        terminal.press(CTRL_C)
        assert terminal.end() == 130
    assert "Traceback" not in terminal.output


def test_ctrl_c_while_a_server_starts(
    tmp_path: Path, llama_folder: Path, terminals: list[Terminal]
) -> None:
    terminal = serve(terminals, tmp_path, llama_folder)
    terminal.wait_for_daemon()
    terminal.press(CTRL_C)
    assert terminal.end() == 0
    assert "Traceback" not in terminal.output
    assert terminal.output.splitlines()[-1].endswith("stopped before it was ready to serve")


def test_a_server_outlives_neither_its_window_nor_kill_9(
    tmp_path: Path, llama_folder: Path, terminals: list[Terminal]
) -> None:
    closed = serve(terminals, tmp_path, llama_folder)
    addresses(closed, tmp_path)
    bootstrap = Terminal("-m", "planetserve.run_dht", *LOOPBACK)
    terminals.append(bootstrap)
    bootstrap.wait_for("--initial_peers /ip4")
    closed.close_window()
    assert closed.end() == 0
    bootstrap.note_family()
    assert len(bootstrap.family) == 2
    bootstrap.process.kill()
    assert bootstrap.end() == -signal.SIGKILL


def test_ctrl_c_ends_a_bootstrap_peer(terminals: list[Terminal]) -> None:
    terminal = Terminal("-m", "planetserve.run_dht", *LOOPBACK)
    terminals.append(terminal)
    terminal.wait_for("--initial_peers /ip4")
    terminal.press(CTRL_C)
    assert terminal.end() == 0
    assert "Traceback" not in terminal.output


NOTEBOOK = """
import sys, torch
from planetserve import AutoDistributedModelForCausalLM

ids = torch.arange(5, 17)[None]
model = AutoDistributedModelForCausalLM.from_pretrained(
    sys.argv[1], initial_peers=sys.argv[2:], torch_dtype="float32"
)
options = dict(do_sample=False, eos_token_id=None)
expected = model.generate(ids, max_new_tokens=4, **options).tolist()
for number in range(3):
    print("writes", number, flush=True)
    try:
        while True:
            model.generate(ids, max_new_tokens=60, **options)
    except KeyboardInterrupt:
        again = model.generate(ids, max_new_tokens=4, **options).tolist()
        print("again", number, again == expected, flush=True)
try:
    with model.inference_session(max_length=200):
        print("writes 3", flush=True)
        while True:
            model.generate(ids, max_new_tokens=1, **options)
except KeyboardInterrupt:
    print("again 3", model.generate(ids, max_new_tokens=4, **options).tolist() == expected)
print("ends with an open model", flush=True)
"""


def test_an_interrupted_client_generates_again_at_once(
    swarm: LocalSwarm, llama_folder: Path, terminals: list[Terminal]
) -> None:
    terminal = Terminal("-c", NOTEBOOK, str(llama_folder), *swarm.initial_peers)
    terminals.append(terminal)
    for number in range(4):
        terminal.wait_for(f"writes {number}")
        while not swarm.servers[0].handler.num_sessions:
            time.sleep(0.02)
        if number == 1:  # as Ctrl-Z and fg, which stop it alone
            terminal.process.suspend()
            time.sleep(0.2)
            terminal.process.resume()
        terminal.press(CTRL_C)
        terminal.wait_for(f"again {number}")
    assert terminal.end() == 0
    assert terminal.output.count("True") == 4, terminal.output
    assert terminal.output.splitlines()[-1] == "ends with an open model"


def test_ctrl_c_ends_the_demo_and_all_that_it_started(terminals: list[Terminal]) -> None:
    terminal = Terminal("-m", "planetserve.demo")
    terminals.append(terminal)
    terminal.wait_for("bootstrap peer, process")
    terminal.press(CTRL_C)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.output
    assert "interrupted" in terminal.output


def test_ctrl_c_while_a_plan_waits_for_servers(
    swarm: LocalSwarm, tmp_path: Path, llama_folder: Path, terminals: list[Terminal]
) -> None:
    terminal = Terminal(
        "-m", "planetserve.plan", str(llama_folder), "--dht_prefix", "nobody-serves-this",
        "--initial_peers", *swarm.initial_peers,
    )  # fmt: skip
    terminals.append(terminal)
    terminal.wait_for_daemon()
    terminal.press(CTRL_C)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.output
