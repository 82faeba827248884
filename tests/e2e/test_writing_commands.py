"""`planetserve generate` and `chat` write what the local model writes; Ctrl-C, Ctrl-D, pipes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from commands import ENVIRONMENT
from rich.console import Console
from terminals import CTRL_C, CTRL_D, Terminal
from transformers import AutoModelForCausalLM, AutoTokenizer

from planetserve.commands import chat, generate
from planetserve.commands.text_options import TextConfig
from planetserve.commands.writing import Writer, opened, safe_text
from planetserve.errors import ConfigError, MissingBlocksError, SessionLengthError
from planetserve.model.file_sources import open_source
from planetserve.testing.swarm import LocalSwarm
from planetserve.wire.frame import FrameType

pytestmark = pytest.mark.timeout(120)

PROMPT = "A list comprehension is"


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("demo", ("0:3", "3:6", "6:8")) as running:
        yield running


@pytest.fixture(scope="module")
def local_demo() -> tuple[Any, Any]:
    """The demo model and its tokenizer in one piece."""
    path, _ = open_source("demo").location
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


@pytest.fixture
def writer(demo_swarm: LocalSwarm) -> Iterator[Writer]:
    config = TextConfig(
        model="demo", initial_peers=demo_swarm.initial_peers, torch_dtype="float32",
        temperature=0.0, max_new_tokens=24,
    )  # fmt: skip
    with opened(config) as found:
        yield found


def locally(local_demo: tuple[Any, Any], ids: list[int], max_new_tokens: int) -> str:
    model, tokenizer = local_demo
    tokens = model.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
    return text


def command(name: str, swarm: LocalSwarm, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", f"planetserve.commands.{name}", "demo",
            *arguments, "--temperature", "0", "--torch_dtype", "float32", "--initial_peers",
            *swarm.initial_peers]  # fmt: skip


def test_generate_writes_to_a_pipe_what_the_local_model_writes(
    demo_swarm: LocalSwarm, local_demo: tuple[Any, Any]
) -> None:
    done = subprocess.run(
        command("generate", demo_swarm, "-", "--max_new_tokens", "16"), input=PROMPT + "\n",
        capture_output=True, text=True, check=True, env=ENVIRONMENT,
    )  # fmt: skip
    ids = local_demo[1].encode(PROMPT)
    assert done.stdout == locally(local_demo, ids, 16) + "\n"
    assert "16 tokens, " in done.stderr
    assert "blocks 0:3 …" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_generate_for_a_program(
    demo_swarm: LocalSwarm, local_demo: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("generate", demo_swarm, PROMPT, "--max_new_tokens", "8", "--json")[5:]
    generate.main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == locally(local_demo, local_demo[1].encode(PROMPT), 8)
    assert (found["tokens"], found["finish"]) == (8, "length")
    assert [(hop["start"], hop["end"]) for hop in found["chain"]] == [(0, 3), (3, 6), (6, 8)]
    assert found["tokens_per_s"] > 0


def test_what_generate_refuses(demo_swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = ("--initial_peers", *demo_swarm.initial_peers)
    with pytest.raises(ConfigError, match="prompt"):
        generate.main(["demo", *peers])
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate.main(["demo", " ", *peers])
    with pytest.raises(ConfigError, match="no --initial_peers given"):
        generate.main(["demo", PROMPT])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    with pytest.raises(ConfigError, match="not UTF-8"):
        generate.main(["demo", "-", *peers])


def test_a_swarm_without_the_model_says_so(swarm: LocalSwarm) -> None:
    with pytest.raises(MissingBlocksError, match="no server of demo"):
        generate.main(
            ["demo", PROMPT, "--wait_for_blocks_timeout", "0", "--max_retries", "0",
             "--initial_peers", *swarm.initial_peers]
        )  # fmt: skip


def test_a_chat_is_the_local_models_and_sends_each_token_once(
    demo_swarm: LocalSwarm, local_demo: tuple[Any, Any], writer: Writer
) -> None:
    messages: list[dict[str, str]] = []
    shown: list[str] = []
    num_previous = 0
    for question in ("What is a list?", "And a tuple?", "And a set?"):
        messages.append({"role": "user", "content": question})
        ids = writer.encode_chat(messages)
        num_before = tokens_run(demo_swarm)
        answer = writer.reply(messages, shown.append)
        assert answer.text == locally(local_demo, ids, 24)
        assert answer.num_prompt_tokens == len(ids)
        # What came before is held by the servers, but for a last token whose bounds may change.
        num_new = len(ids) - num_previous + answer.num_tokens
        assert tokens_run(demo_swarm) - num_before <= num_new + 1
        num_previous = len(ids)
        messages.append({"role": "assistant", "content": answer.text})
    assert "".join(shown) == "".join(one["content"] for one in messages[1::2])


def test_a_chat_moves_to_larger_sessions_now_and_then(
    local_demo: tuple[Any, Any], writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planetserve.commands.writing._LEAST_SESSION", 1)
    messages: list[dict[str, str]] = []
    lengths = []
    for question in ("What is a list?", "And a tuple?", "And a set?", "And a dictionary?"):
        messages.append({"role": "user", "content": question})
        answer = writer.reply(messages, lambda _: None)
        assert answer.text == locally(local_demo, writer.encode_chat(messages), 24)
        messages.append({"role": "assistant", "content": answer.text})
        assert writer._session is not None
        lengths.append(writer._session.max_length or 0)
    assert lengths == sorted(lengths)
    assert 1 < len(set(lengths)) < len(lengths)


def tokens_run(swarm: LocalSwarm) -> int:
    """Tokens of steps that the server of the first blocks has received."""
    first = swarm.servers[0].node.peer_id
    return sum(
        frame.header.num_tokens
        for frame in swarm.frames
        if (frame.node, frame.way, frame.header.type) == (first, "received", FrameType.STEP)
    )


def test_a_chat_that_outgrows_the_model(writer: Writer) -> None:
    words = "a list of words " * 600
    messages = [{"role": "user", "content": "Hi"}]
    writer.reply(messages, lambda _: None)
    messages += [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": words}]
    with pytest.raises(SessionLengthError, match="the model takes"):
        writer.reply(messages, lambda _: None)


def test_a_text_of_control_characters_is_spelled_out() -> None:
    assert safe_text("a\x1b[2Jb\r\x9b\n\tc") == "a\\x1b[2Jb\\r\\x9b\n\tc"
    assert safe_text("日本\u3000語 é\u00a0👩\u200d💻") == "日本\u3000語 é\u00a0👩\u200d💻"


def test_a_chat_at_a_terminal(demo_swarm: LocalSwarm) -> None:
    terminal = Terminal(*command("chat", demo_swarm)[1:])
    try:
        type_at_prompt(terminal, b"What is a list?\r")
        terminal.wait_for("tokens/s, first after")
        assert "blocks 0:3 …" in terminal.output
        type_at_prompt(terminal, CTRL_C)
        type_at_prompt(terminal, b"/nonsense\r")
        type_at_prompt(terminal, b"/new\r")
        type_at_prompt(terminal, CTRL_D)
        assert terminal.end() == 0
        assert "Traceback" not in terminal.output
        assert terminal.output.count("Ctrl-D ends the chat") == 2  # at the start and for Ctrl-C
        assert "there is no /nonsense" in terminal.output
        assert "a new chat" in terminal.output
    finally:
        terminal.destroy()


def type_at_prompt(terminal: Terminal, keys: bytes) -> None:
    """Press keys once the program waits for them: what comes earlier, Ctrl-C throws away."""
    while not terminal.output.endswith("> "):
        assert terminal.process.status() != psutil.STATUS_ZOMBIE, terminal.output
        time.sleep(0.02)
    num_chars = len(terminal.output)
    terminal.press(keys)
    while len(terminal.output) == num_chars and terminal.process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    writer: Writer,
) -> None:
    """The key is pressed by the answer itself, at its third piece."""
    shown: list[str] = []

    def press(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    messages = [{"role": "user", "content": "What is a list?"}]
    stopped = writer.reply(messages, press)
    assert stopped.finish == "interrupt"
    assert 3 <= stopped.num_tokens < 24
    whole = writer.reply(messages, lambda _: None)
    assert whole.finish != "interrupt"
    assert whole.text.startswith(stopped.text)


def test_a_chat_reads_lines_from_a_pipe(demo_swarm: LocalSwarm) -> None:
    lines = "What is\\\na list?\n\n/new\nHi\n"
    done = subprocess.run(
        command("chat", demo_swarm, "--max_new_tokens", "4"), input=lines,
        capture_output=True, text=True, check=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.stdout.count(" tokens/s") == 2
    assert "> " not in done.stdout
    assert "\x1b" not in done.stdout


def test_a_failed_answer_leaves_the_chat_going(
    writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"role": "user", "content": "word " * 5000}]
    console = Console(width=80)
    assert chat._answer(writer, long, console) is None
    assert "send it again" in capsys.readouterr().out
    assert chat._answer(writer, [{"role": "user", "content": "Hi"}], console)
