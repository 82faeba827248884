"""`planetserve doctor`: what keeps this machine from serving or using a swarm, and what to do."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from planetserve import cli
from planetserve.commands import options
from planetserve.commands.findings import Finding
from planetserve.commands.options import SwarmOptions
from planetserve.errors import ConfigError, PlanetServeError

if TYPE_CHECKING:
    from rich.console import Console

    from planetserve.clock import Clock
    from planetserve.model.checkpoint import Checkpoint

PROG = "planetserve doctor"

USAGE = "[MODEL] [--initial_peers ADDRESS...] [--port N [--public_ip IP]] [--json] [more flags]"

DESCRIPTION = """\
Look for what keeps this machine from serving or using a swarm, and say what to do about it:
versions, file descriptors, disk, memory and device; with --port, whether a server can listen there;
with --initial_peers, peers, clock and directory; with MODEL besides, its servers, their revision,
protocol and links, and a short text written by them. Exits with 1 if there is a fault.

Nobody is asked to dial back, as the protocol has no such request: whether others reach a port is
seen from here only, by dialling --public_ip.
"""

EXAMPLES = """examples:
  this machine alone, and what it needs for a model:
    planetserve doctor
    planetserve doctor demo
  before serving:
    planetserve doctor demo --port 31337 --public_ip 203.0.113.5
  when a swarm does not work:
    planetserve doctor demo --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
"""

GROUPS = {
    "what to look at": ("model", "device", "port", "public_ip", *options.SWARM, *options.FILES,
                        "no_generation"),
    "output": ("json", "log_level"),
}  # fmt: skip

JSON_VERSION = 1
_PROMPT = "Hello"
_NUM_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig(SwarmOptions):
    """What to look at.

    Raises:
        ConfigError: a value is out of range.
    """

    device: str = "auto"
    """Where a server would compute: auto, cpu, cuda, cuda:1, mps."""
    port: int | None = None
    """TCP port that a server would listen on."""
    public_ip: str | None = None
    """Address at which others would dial that port."""
    no_generation: bool = False
    """Do not load the client's half of the model and write a short text."""

    @override
    def __post_init__(self) -> None:
        SwarmOptions.__post_init__(self)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is no TCP port; give 1 to 65535")
        if self.public_ip is not None and self.port is None:
            raise ConfigError("--public_ip needs --port, the port forwarded to this machine")


def parse(argv: Sequence[str] | None = None) -> DoctorConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(PROG, USAGE, DESCRIPTION, EXAMPLES)
    cli.add_fields(parser, DoctorConfig, GROUPS, positional=("model",))
    return cli.parse_config(parser, DoctorConfig, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Check and show.

    Raises:
        ConfigError: the command line is wrong.
        SystemExit: with 1, if there is a fault.
    """
    config = parse(argv)
    cli.setup_logging(config.log_level)

    from rich.console import Console

    console = Console(highlight=False)
    found = []
    for finding in examine(config):
        found.append(finding)
        if not config.json:
            _print(finding, console)
    num_faults = sum(finding.verdict == "fault" for finding in found)
    if config.json:
        findings = [dataclasses.asdict(finding) for finding in found]
        document = {"version": JSON_VERSION, "faults": num_faults, "findings": findings}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    elif not num_faults:
        console.print("no fault found", style="bold green")
    else:
        words = "1 fault" if num_faults == 1 else f"{num_faults} faults"
        console.print(f"{words} found", style="bold red")
    if num_faults:
        sys.exit(1)


def _temporary_folder() -> Iterator[Finding]:
    """A fault if there is none: then torch cannot even be imported."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        yield Finding(
            "disk", "fault", f"no temporary folder can be written: {error.strerror}",
            "free some space, or set TMPDIR to a folder on another disk",
        )  # fmt: skip


def examine(config: DoctorConfig, clock: Clock | None = None) -> Iterator[Finding]:
    """Every check, as it is done.

    Args:
        config: what to look at.
        clock: this machine's time.
    """
    unwritable = list(_temporary_folder())
    yield from unwritable
    if unwritable:
        return
    with cli.ended_by_interrupts():
        from planetserve.commands import machine_checks, swarm_checks
        from planetserve.commands.swarm_reading import Wanted, find_wanted, wanted_of

    yield from machine_checks.versions()
    yield from machine_checks.descriptors()
    yield from machine_checks.device(config.device)
    checkpoint: Checkpoint | None = None
    wanted: Wanted | None = None
    try:
        checkpoint = _own_files(config)
        name = config.model or ""
        wanted = (
            find_wanted(config)
            if checkpoint is None
            else wanted_of(checkpoint, name, config.dht_prefix)
        )
    except ConfigError as error:
        yield Finding("model", "fault", str(error))
    yield from machine_checks.disks(checkpoint, config.cache_dir)
    yield from machine_checks.memory(checkpoint, config.device)
    if config.port is not None:
        yield from machine_checks.port(config.port, config.public_ip)
    if not config.initial_peers:
        return
    is_healthy = False
    with asyncio.Runner() as runner:
        findings = swarm_checks.check_swarm(config, wanted, clock)
        while (finding := runner.run(_next(findings))) is not None:
            is_healthy |= (finding.check, finding.verdict) == ("blocks", "ok")
            yield finding
    if checkpoint is not None and is_healthy and not config.no_generation:
        yield from _generation(config)


def _own_files(config: DoctorConfig) -> Checkpoint | None:
    """The model's files; None if it is named as the directory lists it, or not at all."""
    from planetserve.commands.swarm_reading import is_listed_name, open_checkpoint

    if config.model is None or is_listed_name(config.model):
        return None
    return open_checkpoint(config)


async def _next(findings: AsyncIterator[Finding]) -> Finding | None:
    return await anext(findings, None)


def _generation(config: DoctorConfig) -> Iterator[Finding]:
    """Write a short text with the swarm."""
    from planetserve.commands import writing
    from planetserve.commands.text_options import TextConfig

    text_config = TextConfig(
        model=config.model or "",
        initial_peers=config.initial_peers,
        dht_prefix=config.dht_prefix,
        revision=config.revision,
        token=config.token,
        cache_dir=config.cache_dir,
        max_new_tokens=_NUM_TOKENS,
        temperature=0.0,
        max_retries=1,
        wait_for_blocks_timeout=1,
    )
    try:
        with writing.opened(text_config) as writer:
            answer = writer.complete(writer.encode(_PROMPT), lambda _: None)
    except PlanetServeError as error:
        yield Finding(
            "generation", "fault", str(error),
            "see what the findings above say; the log of the server that is named says more",
        )  # fmt: skip
        return
    if answer.finish == "interrupt":
        raise KeyboardInterrupt
    yield Finding("generation", "ok", answer.report())


def _print(finding: Finding, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "warning": "yellow", "fault": "bold red"}[finding.verdict]
    row = Table.grid(padding=(0, 1, 0, 0))
    for width in (7, 11, None):
        row.add_column(width=width, overflow="fold")
    row.add_row(Text(finding.verdict, style), Text(finding.check, "bold"), Text(finding.detail))
    if finding.advice:
        row.add_row("", "", Text(f"-> {finding.advice}"))
    console.print(row)


if __name__ == "__main__":
    cli.run(PROG, main)
