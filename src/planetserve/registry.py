"""Named strategies: a registry maps a name to a factory and lists its choices when a name is wrong.

Factories are registered as `"module:attribute"` strings so that listing the choices, or parsing a
command line, imports none of them. Third parties add their own through the entry-point group
`planetserve.<registry name>`.
"""

from __future__ import annotations

import importlib
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

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        if self._third_party is None:
            found = metadata.entry_points(group=self._group)
            self._third_party = {point.name: point for point in found}
        return self._third_party
