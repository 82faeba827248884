"""`planetserve chat MODEL`: talk to the model of a swarm in a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planetserve import cli
from planetserve.commands import text_options
from planetserve.commands.text_options import TextConfig
from planetserve.errors import ConfigError, PlanetServeError

if TYPE_CHECKING:
    from rich.console import Console

    from planetserve.commands.writing import Writer

PROG = "planetserve chat"

USAGE = "MODEL --initial_peers ADDRESS... [--system TEXT] [more flags]"

KEYS = """\
Ctrl-C stops an answer, Ctrl-D ends the chat. /new begins another one,
/help shows this. A line that ends with a backslash goes on in the next."""

DESCRIPTION = f"""\
Talk to the model of a swarm. Answers are shown as they are written; after each one, its speed and
the servers that wrote it.

{KEYS}
"""

EXAMPLES = """examples:
  planetserve chat MODEL --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
  planetserve chat MODEL --system 'Answer in one sentence.' --temperature 0 \\
      --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
"""

GROUPS = {
    **text_options.GROUPS,
    "text": ("system", *text_options.GROUPS["text"]),
    "output": ("log_level",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig(TextConfig):
    """Which model to talk to.

    Raises:
        ConfigError: a value is out of range.
    """

    system: str | None = None
    """What the model is told before the chat."""


def parse(argv: Sequence[str] | None = None) -> ChatConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(PROG, USAGE, DESCRIPTION, EXAMPLES)
    cli.add_fields(parser, ChatConfig, GROUPS, positional=("model",))
    return cli.parse_config(parser, ChatConfig, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Talk until Ctrl-D.

    Raises:
        ConfigError: the command line is wrong, or the model cannot be found or has no chat
            template.
        PlanetServeError: the swarm cannot be joined.
    """
    config = parse(argv)
    cli.setup_logging(config.log_level)

    from rich.console import Console

    console = Console(highlight=False)
    with Console(stderr=True).status("loading"), contextlib.ExitStack() as stack:
        with cli.ended_by_interrupts():
            from planetserve.commands.writing import opened

        writer = stack.enter_context(opened(config))
        if not writer.has_chat_template:
            raise ConfigError(
                f"{config.model} has no chat template; complete a text with `planetserve generate`"
            )
        until_end = stack.pop_all()
    with until_end:
        _talk(writer, config.system, console)


def _talk(writer: Writer, system: str | None, console: Console) -> None:
    """Read messages and show answers, until the end of the input."""
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited and called back
        console.print(KEYS, style="dim", markup=False)
    while True:
        try:
            line = _read_message()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D ends the chat", style="dim")
            continue
        match line.split():
            case []:
                continue
            case ["/new"]:
                messages = list(first)
                writer.forget()
                console.print("a new chat", style="dim")
            case ["/help"]:
                console.print(KEYS, style="dim", markup=False)
            case ["/quit" | "/exit"]:
                return
            case [word, *_] if word.startswith("/") and word[1:].isalpha():
                console.print(f"there is no {word}; /help shows what there is", markup=False)
            case _:
                answer = _answer(writer, [*messages, {"role": "user", "content": line}], console)
                if answer is not None:
                    messages += [
                        {"role": "user", "content": line},
                        {"role": "assistant", "content": answer},
                    ]


def _answer(writer: Writer, messages: list[dict[str, str]], console: Console) -> str | None:
    """Show an answer as it is written; None if there is none, so that the message may be sent
    again."""
    from planetserve.commands.writing import safe_text

    def show(text: str) -> None:
        sys.stdout.write(safe_text(text))
        sys.stdout.flush()

    try:
        answer = writer.reply(messages, show)
    except PlanetServeError as error:
        console.print(f"\n{error}", style="red", markup=False)
        console.print("this message is not part of the chat; send it again", style="dim")
        return None
    except KeyboardInterrupt:
        console.print("\nstopped", style="dim")
        return None
    console.print(f"\n{answer.report()}\n", style="dim", markup=False)
    return answer.text or None


def _read_message() -> str:
    """The next message, of several lines if they end with backslashes.

    Raises:
        EOFError: the input has ended.
    """
    prompt = "> " if sys.stdin.isatty() else ""
    lines: list[str] = []
    while True:
        line = input(prompt)
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
        prompt = prompt and ". "


if __name__ == "__main__":
    cli.run(PROG, main)
