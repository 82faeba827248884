"""`python -m planetserve.demo`, or `make demo`: a swarm on this machine completes a prompt.

Starts a bootstrap peer and three servers as processes of their own on loopback, generates through
them, and compares every token with what transformers generates alone from the same files. Exits
with 0 only if all are equal. Whatever happens, an interrupt included, the processes it started are
gone when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planetserve import cli
from planetserve.errors import ConfigError, PlanetServeError
from planetserve.types import BlockSpan, Chain

if TYPE_CHECKING:
    import torch
    from rich.console import Console

PROG = "python -m planetserve.demo"
DEFAULT_PROMPT = "A list comprehension is"
NUM_SERVERS = 3
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Options:
    """What the demo runs."""

    prompt: str = DEFAULT_PROMPT
    """Text to complete; the environment variable PROMPT gives it too."""
    model: str = "demo"
    """Folder or Hugging Face repository of the model; "demo" is the small one in this package."""
    max_new_tokens: int = 64
    """How many tokens to generate at most."""


@dataclass(frozen=True, slots=True)
class Output:
    """One greedy completion and its timing."""

    tokens: list[int]
    first_token_s: float
    tokens_per_s: float


@dataclass
class Child:
    """A process of the swarm."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_file: Path

    def wait_ready(self) -> dict[str, Any]:
        """The contents of its ready file, once it is there.

        Raises:
            PlanetServeError: it stopped, or took too long; with the end of its log.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.ready_file.exists():
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline_s:
                why = f"took over {START_TIMEOUT_S:g} s" if code is None else f"exited with {code}"
                sys.stderr.write(f"--- end of the log of {self.name} ---\n{self.log_tail()}\n")
                raise PlanetServeError(f"{self.name} did not start: {why}")
            time.sleep(0.05)
        contents: dict[str, Any] = json.loads(self.ready_file.read_text(encoding="utf-8"))
        return contents

    def log_tail(self, num_lines: int = 15) -> str:
        """The last lines that it printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])


@dataclass
class Children:
    """The processes of the swarm, each in a process group with its libp2p daemon."""

    folder: Path
    started: list[Child] = field(default_factory=list)

    def start(self, name: str, module: str, *arguments: str) -> Child:
        """Run `python -m module arguments --ready_file ...`, its output going to a log file."""
        log = self.folder / f"{len(self.started)}.log"
        ready_file = self.folder / f"{len(self.started)}.ready"
        command = [sys.executable, "-m", module, *arguments, "--ready_file", str(ready_file)]
        with log.open("wb") as output, _signals_held():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            child = Child(name, process, log, ready_file)
            self.started.append(child)
        return child

    def stop(self) -> None:
        """Ask all to stop, wait, and kill what is left; at once if there is an interrupt."""
        with _signals_held() as came:
            for child in self.started:
                child.process.terminate()
            deadline_s = time.monotonic() + STOP_TIMEOUT_S
            for child in self.started:
                while child.process.poll() is None and not came and time.monotonic() < deadline_s:
                    time.sleep(0.02)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo.

    Raises:
        PlanetServeError: a process did not start, or a token differs from local generation.
    """
    options = parse(argv)
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)

    from rich.console import Console

    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="planetserve-demo-") as folder:
        children = Children(Path(folder))
        try:
            peers, names = _start_swarm(console, children, options.model)
            remote = _generate_remotely(console, options, peers, names)
        finally:
            children.stop()
    _report(console, remote, _generate_locally(options))


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read the command line and the environment variable PROMPT.

    Raises:
        ConfigError: an unknown flag or a bad value.
    """
    parser = cli.Parser(
        PROG, "[--prompt TEXT] [more flags]", "Complete a prompt with a private swarm."
    )
    cli.add_fields(parser, Options, {"demo": ("prompt", "model", "max_new_tokens")})
    prompt = {"prompt": os.environ["PROMPT"]} if os.environ.get("PROMPT", "").strip() else {}
    options = cli.parse_config(parser, Options, argv, adjust=lambda given: _fill(given, prompt))
    if not options.prompt.strip() or options.max_new_tokens < 1:
        raise ConfigError("give a --prompt with text in it and --max_new_tokens of at least 1")
    return options


def _fill(given: dict[str, object], missing: dict[str, str]) -> None:
    for name, value in missing.items():
        given.setdefault(name, value)


def split_blocks(num_blocks: int, num_servers: int) -> list[BlockSpan]:
    """Cut `[0, num_blocks)` into consecutive spans of nearly equal length, longer ones first."""
    num_servers = min(num_servers, num_blocks)
    sizes = [num_blocks // num_servers] * num_servers
    for index in range(num_blocks % num_servers):
        sizes[index] += 1
    starts = [sum(sizes[:index]) for index in range(num_servers)]
    return [BlockSpan(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _start_swarm(
    console: Console, children: Children, model: str
) -> tuple[list[str], dict[str, str]]:
    """Start every process; returns the bootstrap peer's addresses and peer id -> server name."""
    with console.status("starting a bootstrap peer"):
        bootstrap = children.start(
            "bootstrap peer", "planetserve.run_dht", "--host_maddrs", LOOPBACK
        )
        # It starts while these imports, the slow part, run here.
        from planetserve.model.checkpoint import Checkpoint

        _quiet_transformers()
        spans = split_blocks(Checkpoint.open(model).num_blocks, NUM_SERVERS)
        peers = bootstrap.wait_ready()["addresses"]
    console.print(f"bootstrap peer, process {bootstrap.process.pid}")
    names = {}
    with console.status(f"starting {len(spans)} servers"):
        servers = [
            children.start(
                f"server {number}", "planetserve.run_server", model, "--block_indices", str(span),
                "--initial_peers", *peers, "--host_maddrs", LOOPBACK, "--torch_dtype", "float32",
                "--num_threads", "1",
            )
            for number, span in enumerate(spans, 1)
        ]  # fmt: skip
        for server, span in zip(servers, spans, strict=True):
            names[server.wait_ready()["peer_id"]] = server.name
            console.print(f"{server.name}, process {server.process.pid}: blocks {span}")
    return peers, names


def _generate_remotely(
    console: Console, options: Options, peers: list[str], names: dict[str, str]
) -> Output:
    """Stream the completion through the swarm and show the chain that made it."""
    import torch

    from planetserve import AutoDistributedModelForCausalLM

    torch.set_num_threads(1)
    with console.status("joining as a client"):
        model = AutoDistributedModelForCausalLM.from_pretrained(
            options.model, initial_peers=peers, torch_dtype="float32", show_route=False
        )
    with model:
        console.print(f"\n{options.prompt}", style="bold", end="", markup=False)
        output = _complete(model, options, show=True)
        chain = model.chain
    _print_chain(console, chain, names)
    return output


def _generate_locally(options: Options) -> Output:
    """The same completion by transformers alone, from the same files in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from planetserve.model.file_sources import open_source

    path, revision = open_source(options.model).location
    model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=torch.float32)
    return _complete(model.eval(), options, show=False)


def _complete(model: Any, options: Options, *, show: bool) -> Output:
    from transformers import AutoTokenizer, TextStreamer

    from planetserve.model.file_sources import open_source

    path, revision = open_source(options.model).location
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    prompt = tokenizer(options.prompt, return_tensors="pt")
    watch = _Stopwatch(
        TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    )
    tokens = model.generate(
        **prompt, max_new_tokens=options.max_new_tokens, do_sample=False, streamer=watch
    )
    new_tokens = tokens[0, prompt["input_ids"].shape[1] :].tolist()
    return Output(new_tokens, watch.first_token_s, watch.tokens_per_s)


class _Stopwatch:
    """A transformers streamer that notes when each token came and hands it on."""

    def __init__(self, streamer: Any):
        self._streamer = streamer
        self._times_s: list[float] = []

    @property
    def first_token_s(self) -> float:
        """From the prompt to the first new token."""
        return self._times_s[1] - self._times_s[0]

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token."""
        num_steps = len(self._times_s) - 2
        return num_steps / (self._times_s[-1] - self._times_s[1]) if num_steps > 0 else 0.0

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then one new token at a time."""
        self._times_s.append(time.perf_counter())
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """No more tokens."""
        if self._streamer is not None:
            self._streamer.end()


def _print_chain(console: Console, chain: Chain, names: dict[str, str]) -> None:
    console.print("\nchain:")
    for hop in chain:
        console.print(f"  blocks {hop.span}  {names.get(hop.peer_id, 'unknown')}  {hop.peer_id}")


def _report(console: Console, remote: Output, local: Output) -> None:
    console.print(f"time to first token: {remote.first_token_s:.2f} s")
    console.print(f"speed: {remote.tokens_per_s:.1f} tokens/s ({local.tokens_per_s:.1f} locally)")
    total = max(len(remote.tokens), len(local.tokens))
    pairs = zip(remote.tokens, local.tokens, strict=False)
    num_equal = sum(ours == theirs for ours, theirs in pairs)
    verdict = "yes" if remote.tokens == local.tokens else "no"
    console.print(f"tokens equal local generation: {verdict} ({num_equal} of {total})")
    if remote.tokens != local.tokens:
        raise PlanetServeError("the swarm generated other tokens than transformers does alone")


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Put interrupts off that come in this block, and are listed in what it gets, to its end."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in _SIGNALS
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(PROG, main)
