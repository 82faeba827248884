"""The command: its flags, and what happens in which order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from planetserve import cli
from planetserve.config import LOG_LEVELS
from planetserve.errors import ConfigError, ModelError

PROG = "python -m planetserve.check"

USAGE = "MODEL [--whole] [--json] [more flags]"

DESCRIPTION = """\
Try whether a model can be served: cut it between all its blocks, compare what comes out with the
model in one piece, and say how sessions will share passes and what a block takes. Of a large model
the first few blocks are tried, as many as it takes to have one of each kind.
"""

EXAMPLES = """examples:
  the small model of this package:
    planetserve check demo

  a folder saved by save_pretrained, all its blocks, for a program to read:
    planetserve check ./my-model --whole --json

docs/add_a_family.md says what to do about each answer. Exit code 0: it can be served.
"""

GROUPS = {
    "what to check": ("model", "revision", "token", "cache_dir", "whole"),
    "output": ("json", "log_level"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """What to check, and what to show.

    Raises:
        ConfigError: a value is out of range, or no model is given.
    """

    model: str = ""
    """Folder or Hugging Face repository of the model, or demo."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    token: str | None = field(default=None, repr=False)
    """Hugging Face access token; by default the one that `hf auth login` saved."""
    cache_dir: str | None = None
    """Folder for downloads; by default Hugging Face's own cache."""
    whole: bool = False
    """Try all blocks of a large model too; takes twice its size in float32."""

    json: bool = False
    """Print one JSON document instead of text."""
    log_level: str = "error"
    """What is logged to stderr: debug, info, warning or error."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("say which MODEL to check: a folder, a repository or demo")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f"log_level={self.log_level!r} is unknown; choose one of: {', '.join(LOG_LEVELS)}"
            )


def parse(argv: Sequence[str] | None = None) -> CheckConfig:
    """Read the command line.

    Raises:
        ConfigError: anything wrong with it.
    """
    parser = cli.Parser(PROG, USAGE, DESCRIPTION, EXAMPLES)
    cli.add_fields(parser, CheckConfig, GROUPS, positional="model")
    return cli.parse_config(parser, CheckConfig, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Try the model, print what came of it, and end with an error if it cannot be served.

    Raises:
        ModelError: the model cannot be served.
        ConfigError: wrong arguments.
    """
    config = parse(argv)
    cli.setup_logging(config.log_level)
    with cli.ended_by_interrupts():
        from planetserve.check import report
        from planetserve.check.trial import check
        from planetserve.model.checkpoint import Checkpoint

    try:
        checkpoint = Checkpoint.open(
            config.model,
            revision=config.revision,
            token=config.token,
            cache_dir=config.cache_dir,
        )
        found = check(checkpoint, whole=config.whole, progress=_progress)
    except ModelError as error:
        if config.json:
            sys.stdout.write(report.refusal_as_json(config.model, str(error)))
        raise
    sys.stdout.write(report.as_json(found) if config.json else report.as_text(found))
    sys.stdout.flush()
    if not found.is_equal:
        raise ModelError(f"{checkpoint.name} cannot be served: {found.comparison.why_not_equal}")


def _progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
