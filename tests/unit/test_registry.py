"""Registries: names without imports, choices on error, third-party entry points."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, deque
from importlib import metadata
from pathlib import Path

import pytest

from planetserve.errors import ConfigError
from planetserve.registry import Registry


def make() -> Registry[object]:
    return Registry(
        "container", "containers",
        {"ordered": "collections:OrderedDict", "counter": "collections:Counter"},
    )  # fmt: skip


def test_names_and_factories() -> None:
    registry = make()
    assert registry.names() == ("counter", "ordered")
    assert registry.factory("ordered") is OrderedDict
    assert registry.create("counter", a=2) == Counter(a=2)


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(
        ConfigError, match=r"^unknown container 'x'; choose one of: counter, ordered$"
    ):
        make().check("x")
    with pytest.raises(ConfigError, match="unknown container"):
        make().create("x")


def test_an_option_that_the_strategy_does_not_have() -> None:
    registry: Registry[object] = Registry("path", "paths", {"mask": "ipaddress:IPv4Address"})
    with pytest.raises(ConfigError, match="path 'mask': .*unexpected keyword argument 'depth'"):
        registry.create("mask", depth=1)


def test_names_are_checked_without_importing_their_module() -> None:
    registry: Registry[object] = Registry("game", "games", {"turtle": "turtledemo.chaos:main"})
    assert registry.check("turtle") == "turtle"
    assert "turtledemo.chaos" not in sys.modules


def test_entry_points_of_installed_packages_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "someones_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: someones-package\nVersion: 1.0\n"
    )
    (folder / "entry_points.txt").write_text(
        "[planetserve.containers]\ntheirs = collections:deque\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.entry_points(group="planetserve.containers")
    registry = make()
    assert registry.names() == ("counter", "ordered", "theirs")
    assert registry.create("theirs", iterable="ab") == deque("ab")
