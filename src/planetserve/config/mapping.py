"""From names and plain values, as flags and YAML files give them, to a checked configuration.

For any configuration dataclass: commands read ones of their own with it as well. A value that does
not fit is an error that names the field and what belongs there.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from planetserve.config.old_names import old_names_of
from planetserve.errors import ConfigError
from planetserve.types import BlockSpan

C = TypeVar("C")


def from_mapping(cls: type[C], values: Mapping[str, object], source: str = "") -> C:
    """Build the configuration `cls` from field names and plain values, as YAML or flags give them.

    Args:
        cls: a configuration dataclass.
        values: field name -> value; numbers, strings, booleans and lists of strings.
        source: where the values come from, for error messages.

    Raises:
        ConfigError: an unknown name (the nearest known one is suggested), a value of the wrong
            type, a missing one, or whatever `cls` itself refuses.
    """
    checked = check_mapping(cls, values, source)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in checked:
            raise ConfigError(f"no {field.name} given{_WHERE.get(field.name, '')}")
    return cls(**checked)


def check_mapping(cls: type, values: Mapping[str, object], source: str = "") -> dict[str, Any]:
    """Check names and types of `values` against the fields of `cls`, and convert them.

    Old names become current ones.

    Raises:
        ConfigError: an unknown name or a value of the wrong type.
    """
    prefix = f"{source}: " if source else ""
    values = old_names_of(cls).current(values, prefix)
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"{prefix}unknown setting {name!r}{did_you_mean(name, hints)}")
        try:
            checked[name] = _convert(value, hints[name])
        except _WrongType:
            raise ConfigError(f"{prefix}{name}={value!r} is not {_describe(hints[name])}") from None
    return checked


def load_yaml(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read a YAML file of settings. Dashes in keys count as underscores.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping of names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read {os.fspath(path)}: {reason}") from error
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{os.fspath(path)} is not valid YAML{place}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{os.fspath(path)} is not a YAML mapping of setting names to values")
    return {key.replace("-", "_"): value for key, value in loaded.items()}


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `choices`, or an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings under the fields of `cls` and of the dataclasses that it extends, read from
    their source: flag name -> help text."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    tree = ast.parse(inspect.cleandoc(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for statement, following in zip(body, body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = inspect.cleandoc(following.value.value)
    return docs


class _Loader(yaml.SafeLoader):
    """YAML without base-60 integers, which would read the span 3:6 as the number 186."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:int"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), "-+0123456789"
)


_WHERE = {"model": "; put a folder, a repository name or demo before the flags"}


class _WrongType(Exception):
    """A value does not fit the annotation of its field."""


def _convert(value: object, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint))
    if origin is Literal:
        return _accept(value, value in typing.get_args(hint))
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        fits = isinstance(items, list | tuple | set | frozenset)
        return tuple(_convert(item, str) for item in _accept(items, fits))
    if hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_accept(value, fits and math.isfinite(value)))  # type: ignore[arg-type]
    if hint is int:
        return _accept(value, isinstance(value, int) and not isinstance(value, bool))
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is BlockSpan and isinstance(value, str):
        return BlockSpan.parse(value)
    return _accept(value, isinstance(value, hint))


def _convert_union(value: object, members: tuple[Any, ...]) -> Any:
    for member in members:
        try:
            return _convert(value, member)
        except _WrongType:
            continue
    raise _WrongType


def _accept(value: Any, fits: bool) -> Any:
    if not fits:
        raise _WrongType
    return value


def _describe(hint: Any) -> str:
    """An annotation in words, for error messages."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string",
             BlockSpan: "START:END"}  # fmt: skip
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = (member for member in typing.get_args(hint) if member is not type(None))
        return " or ".join(map(_describe, members))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if origin is tuple:
        return "a list of strings"
    return words.get(hint, str(hint))
