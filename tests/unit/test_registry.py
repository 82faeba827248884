"""Registries: names without imports, choices on error, third-cohort entry points."""

from __future__ import annotations

import re
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


class Strategy:
    """What the registry below makes."""

    def __init__(
        self, size: int = 3, share: float = 0.5, seed: int | None = None, fast: bool = True
    ):
        self.values = (size, share, seed, fast)


def test_options_after_the_name() -> None:
    registry: Registry[Strategy] = Registry("way", "ways", {"one": f"{__name__}:Strategy"})
    assert registry.create_from("one").values == (3, 0.5, None, True)
    assert registry.create_from("one", seed=4, other=5).values == (3, 0.5, 4, True)
    text = "one:size=7, share=1,fast=false,seed=2"
    assert registry.create_from(text, seed=4).values == (7, 1, 2, False)
    for wrong, says in (
        ("two:size=1", "unknown way 'two'; choose one of: one"),
        ("one:depth=1", "no option 'depth'; its options are size, share, seed, fast"),
        ("one:size=1.5", "size=1.5 must be int"),
        ("one:fast=1", "fast=1 must be bool"),
        ("one:seed=x", "seed='x' must be int | None"),
        ("one:size", "write options as in one:option=value"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            registry.create_from(wrong)
