"""Old names of settings and options. What somebody has written keeps working, with one warning.

The tables below are the only place to add a name to. `accepts_old_names` applies a table to the
arguments of a class; flags, YAML keys and keyword arguments of `from_pretrained` go through
`OldNames.current` as well, so that each warns where it is read.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from planetserve.errors import ConfigError

logger = logging.getLogger(__name__)

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class OldNames:
    """The old names of one class's arguments."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Old name -> new name."""
    unused: Mapping[str, object] = field(default_factory=dict)
    """Names that have no effect any more -> the default that they had."""

    def __iter__(self) -> Iterator[str]:
        return iter((*self.renamed, *self.unused))

    def current(self, given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """The arguments under their current names, without those that have no effect.

        Args:
            given: argument name -> value.
            prefix: stands before names in messages, such as "--" for flags.

        Raises:
            ConfigError: an argument is given by its old and by its new name.
        """
        values = dict(given)
        for old in given:
            if old in self.unused:
                del values[old]
                logger.warning("%s%s has no effect; leave it out", prefix, old)
            elif old in self.renamed:
                new = self.renamed[old]
                if new in values:
                    raise ConfigError(f"{prefix}{old} is the old name of {new}; give only {new}")
                values[new] = values.pop(old)
                logger.warning("%s%s is the old name of %s; write %s", prefix, old, new, new)
        return values

    def with_old(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` under their old names too, for strategies of others that know only these."""
        known = {old: values[new] for old, new in self.renamed.items() if new in values}
        return {**known, **values}


CLIENT = OldNames(
    renamed={"chain_doubt": "chain_load_prior", "chain_spread": "chain_cost_jitter"},
    unused={"request_timeout": 180.0},
)
SERVER = OldNames(
    renamed={"batch_patience": "batch_delay_factor"}, unused={"request_timeout": 180.0}
)
SHORTEST_PATH = OldNames(renamed={"doubt": "load_prior", "spread": "cost_jitter"})
OPTIONS = {"shortest_path": SHORTEST_PATH}
"""Name of a chain optimizer -> the old names of its options."""


def old_names_of(cls: object) -> OldNames:
    """The table that `accepts_old_names` has given to a class; an empty one if there is none."""
    found: OldNames = getattr(cls, "__old_names__", OldNames())
    return found


def accepts_old_names(names: OldNames) -> Callable[[type[C]], type[C]]:
    """A class decorator: the constructor takes old names, a dataclass has them as attributes."""

    def decorate(cls: type[C]) -> type[C]:
        plain_init: Callable[..., None] = cls.__init__

        @functools.wraps(plain_init)
        def init(self: object, *args: Any, **kwargs: Any) -> None:
            plain_init(self, *args, **names.current(kwargs))

        setattr(cls, "__init__", init)  # noqa: B010 - mypy refuses the plain assignment
        setattr(cls, "__old_names__", names)  # noqa: B010 - and classes have no such attribute
        if dataclasses.is_dataclass(cls):
            for old, new in names.renamed.items():
                setattr(cls, old, property(operator.attrgetter(new)))
            for old, default in names.unused.items():
                setattr(cls, old, property(functools.partial(_constant, default)))
        return cls

    return decorate


def _constant(value: object, _owner: object) -> object:
    return value


def current_options(text: str) -> str:
    """A chain optimizer as settings name it, `NAME:option=value,...`, with current option names.

    Raises:
        ConfigError: an option is given by its old and by its new name.
    """
    name, _, listed = text.partition(":")
    names = OPTIONS.get(name, OldNames())
    pairs = [part.partition("=") for part in listed.split(",")]
    given = {key.strip(): value for key, _, value in pairs}
    if not given.keys() & set(names):
        return text  # also where the list is malformed: whoever makes the optimizer says so
    options = names.current(given, f"{name}:")
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in options.items())
