"""Named strategies: a registry maps a name to a factory and lists its choices when a name is wrong.

Factories are registered as `"module:attribute"` strings so that listing the choices, or parsing a
command line, imports none of them. Third cohorts add their own through the entry-point group
`planetserve.<registry name>`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Generic, TypeVar

from planetserve.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> factory of `T`.

    Args:
        kind: what is being chosen, in words, for error messages ("chain optimizer").
        group: the last part of the entry-point group, `planetserve.<group>`.
        builtin: name -> `"package.module:attribute"` of the project's own strategies.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]):
        self._kind = kind
        self._group = f"planetserve.{group}"
        self._targets = dict(builtin)
        self._third_party: dict[str, metadata.EntryPoint] | None = None

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        return tuple(sorted({*self._targets, *self._entry_points()}))

    def check(self, name: str) -> str:
        """Return `name` if it is registered.

        Raises:
            ConfigError: it is not; the message lists the choices.
        """
        if name not in self._targets and name not in self._entry_points():
            raise ConfigError(
                f"unknown {self._kind} {name!r}; choose one of: {', '.join(self.names())}"
            )
        return name

    def factory(self, name: str) -> Callable[..., T]:
        """Import and return the factory registered under `name`."""
        self.check(name)
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            loaded: Any = getattr(importlib.import_module(module), attribute)
        else:
            loaded = self._entry_points()[name].load()
        factory: Callable[..., T] = loaded
        return factory

    def create(self, name: str, **options: Any) -> T:
        """Build the strategy `name` with keyword `options`.

        Raises:
            ConfigError: the name is unknown or an option is not one of its parameters.
        """
        factory = self.factory(name)
        try:
            return factory(**options)
        except TypeError as error:
            raise ConfigError(f"{self._kind} {name!r}: {error}") from error

    def create_from(self, text: str, **offered: Any) -> T:
        """Build what `text` asks for: `name`, or `name:option=value,option=value`.

        Args:
            text: numbers, true and false are read as such, other values as strings.
            **offered: options that the strategy gets if it has them and `text` says nothing else.

        Raises:
            ConfigError: as `create`, or the text is no such list.
        """
        name, _, listed = text.partition(":")
        options: dict[str, Any] = {}
        for part in listed.split(",") if listed else ():
            key, equals, value = part.partition("=")
            if not equals or not key.strip().isidentifier():
                raise ConfigError(
                    f"{self._kind} {text[:80]!r}: write options as in {name}:option=value,..."
                )
            options[key.strip()] = _value(value.strip())
        factory = self.factory(name)
        if (old_names := getattr(factory, "__old_names__", None)) is not None:
            options = old_names.current(options, f"{name}:")
        known, takes_any = _parameters(factory)
        for key, value in options.items():
            if key not in known and not takes_any:
                has = f"its options are {', '.join(known)}" if known else "it has no options"
                raise ConfigError(f"{self._kind} {name!r} has no option {key[:80]!r}; {has}")
            if not _fits(value, known.get(key)):
                wanted = inspect.formatannotation(known[key])
                raise ConfigError(f"{self._kind} {name!r}: {key}={value!r} must be {wanted}")
        return self.create(name, **{k: v for k, v in offered.items() if k in known} | options)

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        if self._third_party is None:
            found = metadata.entry_points(group=self._group)
            self._third_party = {point.name: point for point in found}
        return self._third_party


def _value(text: str) -> int | float | bool | str:
    """The number or truth value that `text` spells, or else `text`."""
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


@functools.cache
def _parameters(factory: Callable[..., object]) -> tuple[dict[str, Any], bool]:
    """Names and annotations of what a factory takes, and whether it takes any other name."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # of built-in classes
        return {}, True
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    named = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
    return {name: hints.get(name) for name in named}, len(named) < len(parameters)


def _fits(value: object, hint: Any) -> bool:
    """Whether a parsed option is of the annotated type; unknown annotations fit all."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (int, bool, str, type(None)) else True
