"""`planetserve status`: who serves which blocks of a model, as a picture in the terminal.

It reads the directory and pings the servers, and waits for nothing that is missing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from planetserve import cli
from planetserve.commands import options
from planetserve.commands.options import SwarmOptions
from planetserve.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planetserve.commands.swarm_reading import SwarmReader, Wanted

PROG = "planetserve status"

USAGE = "[MODEL] --initial_peers ADDRESS... [--watch] [--json] [more flags]"

DESCRIPTION = """\
Show which servers hold which blocks of a model, and whether every block is served. Without MODEL,
list the models of the swarm. Nothing is loaded and nothing is waited for.

A bar is a server, over the blocks that it holds. ms/token is what a token of one user takes in all
its blocks now, tokens/s what passes through them in large batches, free cache the tokens of KV
cache that new sessions may have there, and RTT the round-trip time from here; all but the last are
what the server announces.
"""

EXAMPLES = """examples:
  the models of a swarm, and then one of them by the name that the list gives:
    planetserve status --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
    planetserve status llama-0123456789ab --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
  again every 10 seconds, until Ctrl-C:
    planetserve status demo --watch --period 10 \\
        --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
  for a script:
    planetserve status demo --json --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
"""

GROUPS = {
    "what to look at": ("model", *options.SWARM, *options.FILES),
    "output": ("watch", "period", "addresses", "json", "log_level"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig(SwarmOptions):
    """What to look at, and how to show it.

    Raises:
        ConfigError: a value is out of range, or there is no swarm to join.
    """

    watch: bool = False
    """Read again every --period seconds until Ctrl-C; with --json, one document on a line."""
    period: float = 5.0
    """Seconds between two readings with --watch."""
    addresses: bool = False
    """Show where servers can be dialled, after trying it; those that take a connection first."""

    @override
    def __post_init__(self) -> None:
        SwarmOptions.__post_init__(self)
        if not self.period >= 1:
            raise ConfigError(f"period={self.period:g} must be at least 1 second")
        self.require_peers()


def parse(argv: Sequence[str] | None = None) -> StatusConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(PROG, USAGE, DESCRIPTION, EXAMPLES)
    cli.add_fields(parser, StatusConfig, GROUPS, positional=("model",))
    return cli.parse_config(parser, StatusConfig, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Show the swarm once, or until Ctrl-C with `--watch`.

    Raises:
        ConfigError: the command line is wrong, or the model cannot be found.
        PlanetServeError: the swarm cannot be joined, or does not answer.
    """
    config = parse(argv)
    cli.setup_logging(config.log_level)
    with cli.ended_by_interrupts():
        from planetserve.commands.swarm_reading import find_wanted

        wanted = find_wanted(config)
    if config.watch:
        cli.run_until_signalled(lambda stop: _watch(config, wanted, stop))
    else:
        asyncio.run(_show(config, wanted))


async def _show(config: StatusConfig, wanted: Wanted | None) -> None:
    from rich.console import Console

    from planetserve.commands.swarm_reading import joined

    console = Console(highlight=False)
    async with joined(config) as reader:
        picture, document = await _read(config, wanted, reader, console)
    if config.json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        console.print(picture)


async def _watch(config: StatusConfig, wanted: Wanted | None, stop: asyncio.Event) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from planetserve.commands.swarm_reading import joined

    console = Console(highlight=False)
    in_place = console.is_terminal and not config.json
    async with joined(config) as reader:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while not stop.is_set():
                try:
                    picture, document = await _read(config, wanted, reader, console)
                except TransportError as error:
                    picture, document = Text(str(error), style="bold red"), {"error": str(error)}
                if in_place:
                    live.update(picture, refresh=True)
                elif config.json:
                    sys.stdout.write(json.dumps(document) + "\n")
                    sys.stdout.flush()
                else:
                    console.print(picture)
                try:
                    async with asyncio.timeout(config.period):
                        await stop.wait()
                except TimeoutError:
                    continue


async def _read(
    config: StatusConfig, wanted: Wanted | None, reader: SwarmReader, console: Any
) -> tuple[RenderableType, dict[str, Any]]:
    """The picture and the document of what there is now."""
    from planetserve.commands import swarm_picture

    if wanted is None:
        models = await reader.every_model()
        return swarm_picture.draw_models(models), swarm_picture.models_json(models)
    status = await reader.model(wanted, with_addresses=config.addresses)
    picture = swarm_picture.draw(status, console, with_addresses=config.addresses)
    return picture, swarm_picture.as_json(status, with_addresses=config.addresses)


if __name__ == "__main__":
    cli.run(PROG, main)
