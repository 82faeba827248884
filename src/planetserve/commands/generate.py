"""`planetserve generate MODEL PROMPT`: complete a text with a swarm, from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from planetserve import cli
from planetserve.commands import text_options
from planetserve.commands.text_options import TextConfig
from planetserve.errors import ConfigError

if TYPE_CHECKING:
    from planetserve.commands.writing import Answer

PROG = "planetserve generate"

USAGE = "MODEL PROMPT --initial_peers ADDRESS... [--chat] [--json] [more flags]"

DESCRIPTION = """\
Complete a text with the model of a swarm. The answer goes to stdout as it is written; the chain of
servers and the speed go to stderr. Ctrl-C ends it.
"""

EXAMPLES = """examples:
  a text from the command line, then one from a file:
    planetserve generate demo 'A list comprehension is' --temperature 0 \\
        --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
    planetserve generate demo - --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo... <text
  a question to a model that was trained on chats:
    planetserve generate MODEL 'What is a list?' --chat \\
        --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
"""

GROUPS = {
    **text_options.GROUPS,
    "text": ("prompt", "chat", *text_options.GROUPS["text"]),
    "output": ("json", "log_level"),
}

JSON_VERSION = 1
_MAX_PROMPT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(TextConfig):
    """What to complete, and how to show it.

    Raises:
        ConfigError: a value is out of range, or there is no prompt.
    """

    prompt: str
    """The text to complete, in quotes; - reads it from stdin."""
    chat: bool = False
    """Give the prompt as a message of a chat, by the model's chat template."""
    json: bool = False
    """Print one JSON document at the end, with the text, the speed and the chain."""

    @override
    def __post_init__(self) -> None:
        TextConfig.__post_init__(self)
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty; give a text in quotes, or - to read stdin")


def parse(argv: Sequence[str] | None = None) -> GenerateConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(PROG, USAGE, DESCRIPTION, EXAMPLES)
    cli.add_fields(parser, GenerateConfig, GROUPS, positional=("model", "prompt"))
    return cli.parse_config(parser, GenerateConfig, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write one answer.

    Raises:
        ConfigError: the command line is wrong, or the model cannot be found.
        PlanetServeError: the swarm cannot be joined, or cannot run the model.
        KeyboardInterrupt: the user ended it.
    """
    config = parse(argv)
    cli.setup_logging(config.log_level)
    prompt = _read_stdin() if config.prompt == "-" else config.prompt

    from rich.console import Console

    with Console(stderr=True).status("loading"), cli.ended_by_interrupts():
        from planetserve.commands import writing

    is_terminal = sys.stdout.isatty()

    def show(text: str) -> None:
        if not config.json:
            sys.stdout.write(writing.safe_text(text) if is_terminal else text)
            sys.stdout.flush()

    with writing.opened(config) as writer:
        if config.chat:
            ids = writer.encode_chat([{"role": "user", "content": prompt}])
        else:
            ids = writer.encode(prompt)
        answer = writer.complete(ids, show)
    if config.json:
        sys.stdout.write(_as_json(config, answer))
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
        sys.stderr.write(f"{answer.report()}\n")
    if answer.finish == "interrupt":
        raise KeyboardInterrupt


def _read_stdin() -> str:
    """The prompt on stdin, without the line break at its end.

    Raises:
        ConfigError: it is empty, too long, or no text.
    """
    data = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
    if len(data) > _MAX_PROMPT_BYTES:
        raise ConfigError(f"the prompt on stdin is longer than {_MAX_PROMPT_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError("the prompt on stdin is not UTF-8 text") from error
    if not text.strip():
        raise ConfigError("the prompt on stdin is empty")
    return text


def _as_json(config: GenerateConfig, answer: Answer) -> str:
    chain = answer.chain or ()
    document = {
        "version": JSON_VERSION,
        "model": config.model,
        "text": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.num_prompt_tokens,
        "tokens": answer.num_tokens,
        "first_token_s": answer.first_token_s,
        "tokens_per_s": answer.tokens_per_s,
        "chain": [{"peer_id": hop.peer_id, "start": hop.start, "end": hop.end} for hop in chain],
    }
    return json.dumps(document, indent=2) + "\n"


if __name__ == "__main__":
    cli.run(PROG, main)
