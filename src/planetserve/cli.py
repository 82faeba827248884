"""What every command shares: flags from a configuration dataclass, YAML, errors, signals.

A command builds a `Parser`, adds one flag per field of its configuration (`add_fields`), and calls
`parse_config`, where a flag wins over the YAML file named by `-c`, and that over the dataclass's
default. Flags may be written with underscores or dashes. `run` turns the errors that reach it
into one line on stderr and an exit code: 2 for what the user can correct (`ConfigError`), 1 for
any other `PlanetServeError`, 130 for an interrupt.

Nothing heavy is imported here, so that `--help` and mistakes answer at once: commands import
torch, transformers and hivemind only after their arguments have been read. `main` is the umbrella
command `planetserve`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from typing_extensions import override

import planetserve
from planetserve.config import check_mapping, did_you_mean, field_docs, from_mapping, load_yaml
from planetserve.errors import ConfigError, PlanetServeError

C = TypeVar("C")

COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("planetserve.run_server", "serve some blocks of a model"),
    "dht": ("planetserve.run_dht", "run a peer that others join the swarm through"),
    "plan": ("planetserve.plan", "show which chain a request would get, and how fast it would be"),
    "simulate": ("planetserve.simulation", "show what users would see, in simulated time"),
    "demo": ("planetserve.demo", "a private swarm on this machine that completes a prompt"),
}
"""Subcommand -> module with a `main(argv) -> None`, and what it does."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError`, takes both spellings and suggests names.

    Args:
        prog: name of the command in messages.
        usage: the arguments that matter, in short.
        description: what the command does.
        examples: shown after the flags.
    """

    def __init__(self, prog: str, usage: str, description: str, examples: str = ""):
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=planetserve.__version__)

    def add_hidden(self, name: str, num_values: int) -> None:
        """Accept `--name` with 0 or 1 values without listing it in the help."""
        options: dict[str, Any] = {} if num_values else {"action": "store_true"}
        self.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)

    @override
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ConfigError(message)

    @override
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, after dashes in the names of flags have become underscores."""
        argv = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args([_underscored(item) for item in argv], namespace)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            name = rest[0].partition("=")[0]
            hint = did_you_mean(name, known) or f"; see {self.prog} --help"
            raise ConfigError(f"unknown argument {name!r}{hint}")
        return found, rest


def add_fields(
    parser: Parser, cls: type, groups: Mapping[str, Iterable[str]], positional: str | None = None
) -> None:
    """Add a flag for each named field of the configuration `cls`, under group titles.

    Help texts are the fields' docstrings and defaults come from the dataclass. A flag that is not
    given leaves no trace in the namespace. Also adds `-c/--config`.

    Args:
        parser: where to add.
        cls: a configuration dataclass.
        groups: group title -> names of fields.
        positional: the field that is given by place instead of by a flag; optional in parsing, so
            that a YAML file may give it.
    """
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            text = docs.get(name, "").rstrip(".").replace("%", "%%")
            options = _argument(name, hints[name])
            if name == positional:
                group.add_argument(
                    name, nargs="?", metavar=name.upper(), help=text, default=argparse.SUPPRESS
                )
                continue
            default = defaults[name]
            if default not in (None, (), "", False, 0, dataclasses.MISSING):
                text += f" (default: {default:g})" if _is_number(default) else f" ({default})"
            group.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **options)
    parser.add_argument(
        "-c", "--config", metavar="FILE", help="YAML file of settings, named like the flags"
    )


def parse_config(
    parser: Parser,
    cls: type[C],
    argv: Sequence[str] | None = None,
    exclusive: Iterable[tuple[str, str]] = (),
    adjust: Callable[[dict[str, object]], None] | None = None,
) -> C:
    """Read flags and the YAML file named by `-c` into a configuration.

    Args:
        parser: a parser that `add_fields` filled from `cls`.
        cls: the configuration dataclass.
        argv: arguments; None reads the process's own.
        exclusive: pairs of fields of which a flag for one overrides the file's value for the other.
        adjust: changes the flags that were given before they are checked, for flags that are no
            field of `cls`.

    Raises:
        ConfigError: anything wrong with either; the message says what.
    """
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    if adjust is not None:
        adjust(given)
    from_file = load_yaml(path) if path else {}
    check_mapping(cls, from_file, source=path or "")
    for pair in exclusive:
        if any(name in given for name in pair):
            for name in pair:
                from_file.pop(name, None)
    return from_mapping(cls, {**from_file, **given})


def setup_logging(level: str) -> None:
    """Log to stderr, one line per event, from `level` ("debug", "info", ...) up."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )


def write_ready_file(
    path: str | os.PathLike[str], peer_id: str, addresses: Sequence[str], **details: object
) -> None:
    """Tell whoever waits for this process that it answers.

    The file appears at once and whole (written beside its place, then renamed), as JSON with
    `pid`, `peer_id`, `addresses` (multiaddresses ready for `--initial_peers`) and `details`.

    Raises:
        ConfigError: the file cannot be written.
    """
    target = Path(path)
    record = {"pid": os.getpid(), "peer_id": peer_id, "addresses": list(addresses), **details}
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(record, file)
                file.write("\n")
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write --ready_file {target}: {error.strerror}") from error


def run_until_signalled(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `main(stop)` on a new event loop; SIGINT or SIGTERM sets `stop`.

    `main` should drain and return once `stop` is set. A second signal cancels it.

    Raises:
        KeyboardInterrupt: a second signal came before `main` had returned.
    """

    async def body() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        task = asyncio.current_task()

        def on_signal() -> None:
            if stop.is_set() and task is not None:
                task.cancel()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        try:
            await main(stop)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    try:
        asyncio.run(body())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def run(prog: str, main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit with its code; errors become one line on stderr."""
    try:
        main()
    except ConfigError as error:
        _exit(prog, error, 2)
    except PlanetServeError as error:
        _exit(prog, error, 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has seen enough. The interpreter would complain at its own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(0)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command `planetserve`: hand over to the subcommand's module."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    run("planetserve", lambda: _dispatch(arguments))


def _dispatch(arguments: Sequence[str]) -> None:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        "planetserve",
        "COMMAND ...",
        "One large language model, spread over many machines.",
        f"commands:\n{listing}\n\nplanetserve COMMAND --help tells more.",
    )
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="see below")
    # Only what stands before the subcommand is the umbrella's; the rest is the subcommand's own.
    parsed = parser.parse_args(arguments[:1])
    if parsed.command is None:
        raise ConfigError(f"no command given; choose one of: {', '.join(COMMANDS)}")
    if parsed.command not in COMMANDS:
        hint = did_you_mean(parsed.command, COMMANDS) or f"; choose one of: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {parsed.command!r}{hint}")
    module = importlib.import_module(COMMANDS[parsed.command][0])
    module.main(arguments[1:])


def _exit(prog: str, error: PlanetServeError, code: int) -> NoReturn:
    line = " ".join(str(error).split())
    sys.stderr.write(f"{prog}: error: {line}\n")
    sys.exit(code)


def _underscored(argument: str) -> str:
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_METAVARS = {
    "file": "FILE",
    "path": "FILE",
    "dir": "FOLDER",
    "peers": "ADDRESS",
    "maddrs": "ADDRESS",
    "dtype": "TYPE",
    "ip": "IP",
    "indices": "START:END",
}
"""Last word of a field's name -> what its value is called in the help."""


def _argument(name: str, hint: Any) -> dict[str, Any]:
    """The `add_argument` options for a field of this name and annotation."""
    members = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
    if members == [bool]:
        return {"action": "store_true"}
    options: dict[str, Any] = {"metavar": _METAVARS.get(name.rpartition("_")[2], "VALUE")}
    if int in members or float in members:
        options = {"metavar": "N", "type": _number_or_word}
    if typing.get_origin(members[0]) is tuple:
        options["nargs"] = "+"
    return options


def _number_or_word(text: str) -> int | float | str:
    """The number that `text` spells, or `text`: `from_mapping` says what does not fit."""
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


if __name__ == "__main__":
    main()
