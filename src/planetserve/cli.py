"""What every command shares: flags from a configuration dataclass, YAML, errors, signals.

A command builds a `Parser`, adds one flag per field of its configuration (`add_fields`), and calls
`parse_config`, where a flag wins over the YAML file named by `-c`, and that over the dataclass's
default. Flags may be written with underscores or dashes. `run` turns the errors that reach it
into one line on stderr and an exit code: 2 for what the user can correct (`ConfigError`), 1 for
any other `PlanetServeError`, 130 for an interrupt.

Nothing heavy is imported here, so that `--help` and mistakes answer at once: commands import torch
and hivemind only after their arguments have been read. `main` is the command `planetserve`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import types
import typing
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from typing_extensions import override

import planetserve
from planetserve.config import check_mapping, did_you_mean, field_docs, from_mapping, load_yaml
from planetserve.config.old_names import old_names_of
from planetserve.errors import ConfigError, PlanetServeError, printable

logger = logging.getLogger(__name__)

C = TypeVar("C")

_CANNOT_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_LAST_S = 0.8
"""For what is released after a second signal."""

COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("planetserve.run_server", "serve some blocks of a model"),
    "dht": ("planetserve.run_dht", "run a peer that others join the swarm through"),
    "gateway": ("planetserve.run_gateway", "answer OpenAI's API over HTTP with a swarm's model"),
    "status": ("planetserve.commands.status", "show who serves which blocks, and what is missing"),
    "estimate": ("planetserve.commands.estimate", "show what a model takes, and how fast it is"),
    "doctor": ("planetserve.commands.doctor", "find what is wrong here or in a swarm"),
    "generate": ("planetserve.commands.generate", "complete a text with a swarm"),
    "chat": ("planetserve.commands.chat", "talk to a swarm's model in the terminal"),
    "plan": ("planetserve.plan", "show which chain a request would get, and how fast it would be"),
    "check": ("planetserve.check", "try whether a model can be served, and how"),
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

    def add_hidden(self, name: str, num_values: int | str) -> None:
        """Accept `--name` without listing it in the help.

        Args:
            name: without dashes.
            num_values: 0, 1, or the `nargs` of argparse for a list.
        """
        options: dict[str, Any] = {"action": "store_true"} if num_values == 0 else {}
        if isinstance(num_values, str):
            options["nargs"] = num_values
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
    parser: Parser, cls: type, groups: Mapping[str, Iterable[str]], positional: Sequence[str] = ()
) -> None:
    """Add a flag for each named field of the configuration `cls`, under group titles.

    Help texts are the fields' docstrings, defaults are the dataclass's. Also adds `-c/--config`.

    Args:
        parser: where to add.
        cls: a configuration dataclass.
        groups: group title -> names of fields.
        positional: fields that are given by place instead of by a flag; optional in parsing, so
            that a YAML file may give them.
    """
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            text = docs.get(name, "").rstrip(".").replace("%", "%%")
            options = _argument(name, hints[name])
            if name in positional:
                group.add_argument(
                    name, nargs="?", metavar=name.upper(), help=text, default=argparse.SUPPRESS
                )
                continue
            default = defaults[name]
            if default not in (None, (), "", False, 0, dataclasses.MISSING):
                text += f" (default: {default:g})" if _is_number(default) else f" ({default})"
            group.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **options)
    for old in old_names_of(cls):
        parser.add_argument(
            f"--{old}", type=_number_or_word, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
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
        adjust: changes what was given, flags and then the file's values, before it is checked: for
            names that are no field of `cls`.

    Raises:
        ConfigError: anything wrong with either; the message says what.
    """
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    given = old_names_of(cls).current(given, "--")
    if adjust is not None:
        adjust(given)
    from_file = load_yaml(path) if path else {}
    if adjust is not None:
        adjust(from_file)
    from_file = old_names_of(cls).current(from_file, f"{path}: ")
    check_mapping(cls, from_file, source=path or "")
    for pair in exclusive:
        if any(name in given for name in pair):
            for name in pair:
                from_file.pop(name, None)
    return from_mapping(cls, {**from_file, **given})


def setup_logging(level: str) -> None:
    """Log to stderr, one line per event, from `level` ("debug", "info", ...) up.

    Control characters are spelled out, whichever library logs them: names in a checkpoint or of a
    peer are a stranger's text.
    """
    logging.setLogRecordFactory(_PrintableRecord)
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )


class _PrintableRecord(logging.LogRecord):
    """A log record whose message a terminal cannot obey."""

    @override
    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return printable(super().getMessage())


def write_ready_file(path: str | os.PathLike[str], **details: object) -> None:
    """Tell whoever waits for this process that it answers.

    The file appears at once and whole (written beside its place, then renamed), as JSON with `pid`
    and `details`.

    Raises:
        ConfigError: the file cannot be written.
    """
    target = Path(path)
    record = {"pid": os.getpid(), **details}
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


@contextlib.contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """In this block Ctrl-C ends the process at once: for imports, when nothing is held yet.

    A library that is being loaded may catch a KeyboardInterrupt or turn it into another error.
    """

    def end(number: int, _frame: object) -> None:
        sys.stderr.write("interrupted\n")
        _end_process(128 + number)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_until_signalled(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `main(stop)` on a new event loop; SIGINT, SIGTERM or SIGHUP sets `stop`.

    `main` should drain and return once `stop` is set; then the process ends with 0. A second signal
    cancels `main`, and the process ends with 128 + its number as soon as that has released what it
    holds, or after a second. No thread is waited for: one that loads a model may take minutes.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    came: list[int] = []

    async def body() -> None:
        loop, stop, task = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()

        # Not the loop's own kind of handler: this one runs while the loop is busy, too.
        def on_signal(number: int, _frame: object) -> None:
            came.append(number)
            if len(came) == 1:
                loop.call_soon_threadsafe(stop.set)
                return
            if len(came) > 2 or task is None:
                _end_process(128 + number)
            last = threading.Timer(_LAST_S, _end_process, [128 + number])
            last.daemon = True
            last.start()
            loop.call_soon_threadsafe(task.cancel)

        before = [signal.signal(number, on_signal) for number in numbers]
        try:
            await main(stop)
        except asyncio.CancelledError:
            if not came:
                raise
        except BaseException:
            came.clear()
            raise
        finally:
            if came:
                _end_process(128 + came[1] if len(came) > 1 else 0)
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    asyncio.run(body())


def say(text: str) -> None:
    """Print for a person. What cannot be printed, for a full disk, a pipe that nobody reads or a
    closed window, goes to the log: no reason to stop serving."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        _drop_stdout()
        logger.warning("cannot write to stdout (%s), which would say: %s", error.strerror, text)


def run(prog: str, main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit with its code; errors become one line on stderr."""
    _open_standard_files()
    code: str | int | None = 0
    try:
        try:
            main()
        except SystemExit as end:  # of argparse, after --help
            code = end.code
        sys.stdout.flush()
    except ConfigError as error:
        _exit(prog, error, 2)
    except PlanetServeError as error:
        _exit(prog, error, 1)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        sys.exit(130)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        _drop_stdout()
        if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
            sys.exit(141)
        _exit(prog, PlanetServeError(f"cannot write the output: {error.strerror}"), 1)
    sys.exit(code)


def _drop_stdout() -> None:
    """Let what is printed from here on go nowhere; the interpreter would complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _open_standard_files() -> None:
    """Keep what is opened later, a socket say, from taking the place of a closed stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _end_process(code: int) -> NoReturn:
    """Exit without waiting for threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


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
    sys.stderr.write(f"{prog}: error: {error}\n")
    sys.exit(code)


def _underscored(argument: str) -> str:
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_METAVARS = {
    "file": "FILE", "path": "FILE", "dir": "FOLDER", "peers": "ADDRESS", "maddrs": "ADDRESS",
    "dtype": "TYPE", "ip": "IP", "indices": "START:END",
}  # fmt: skip
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
