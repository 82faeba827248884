"""Who may import whom: the layers of ARCHITECTURE.md, checked against every import statement."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import planetserve

SOURCE = Path(planetserve.__file__).resolve().parent

BASE = {"types", "errors", "config", "registry", "clock"}

ALLOWED: dict[str, set[str]] = {
    # 0: values and errors
    "errors": set(),
    "clock": set(),
    "types": {"errors"},
    "registry": {"errors"},
    "config": {"errors", "types"},
    # 1: decisions and formats; no torch, no network
    "wire": BASE,
    "crypto": BASE | {"wire"},
    "routing": BASE,
    "scheduler": BASE | {"wire"},
    # 2: adapters; apart from what is named here they do not know each other
    "tensors": BASE | {"wire"},
    "history": BASE | {"wire"},
    "native": BASE,
    "model": BASE | {"native"},
    "engine": BASE | {"scheduler", "wire", "model", "native", "tensors", "history"},
    "swarm": BASE | {"wire", "crypto"},
    # 3: roles
    "server": BASE | {"wire", "crypto", "routing", "scheduler", "tensors", "history", "model",
                      "engine", "swarm"},
    "client": BASE | {"wire", "crypto", "routing", "tensors", "history", "model", "swarm"},
    # 4: commands
    "cli": BASE,
    "run_server": BASE | {"cli", "server"},
    "run_dht": BASE | {"cli", "crypto", "swarm"},
    "demo": BASE | {"cli", "client", "model"},
    "plan": BASE | {"cli", "client", "model", "routing"},
    "simulation": BASE | {"cli", "routing", "scheduler"},
    "testing": BASE | {"wire", "crypto", "routing", "scheduler", "tensors", "model", "engine",
                       "swarm", "server", "client"},
}  # fmt: skip

HEAVY = {
    "hivemind": {"swarm"},
    "torch": {
        "tensors",
        "history",
        "native",
        "model",
        "engine",
        "server",
        "client",
        "testing",
        "demo",
    },
    "transformers": {"model", "engine", "client", "testing", "demo"},
    "safetensors": {"model", "testing"},
    "pymoo": {"routing"},
    "matplotlib": {"plan"},
    "simpy": {"simulation"},
}

MODULES = sorted(SOURCE.rglob("*.py"))


def package_of(path: Path) -> str:
    """The first component below `planetserve`: a package, or the name of a module."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def test_every_package_has_a_row() -> None:
    assert {package_of(path) for path in MODULES} - {"__init__"} == set(ALLOWED)


def test_the_table_has_no_cycle() -> None:
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert set(order) == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    package = package_of(path)
    if package == "__init__":
        return  # names the whole public interface, and loads it lazily
    for line, name in imported_names(path):
        top, _, rest = name.partition(".")
        where = f"{path.relative_to(SOURCE)}:{line}"
        if top == "planetserve" and rest not in ("", "__version__"):
            # A public name counts as the module that it comes from.
            rest = planetserve._LAZY.get(rest, name).removeprefix("planetserve.")
            target = rest.partition(".")[0]
            assert target == package or target in ALLOWED[package], f"{where} imports {name}"
        if top in HEAVY:
            assert package in HEAVY[top], f"{where} imports {name}"
