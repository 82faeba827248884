"""Which packages may import which, and how large files and classes may be.

The layers of ARCHITECTURE.md are checked against every import statement. No modules import each
other in a circle, no file is too long, and no class has too many attributes without a reason.
"""

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
    "edge": BASE | {"wire", "crypto", "tensors", "history"},
    "verification": BASE | {"wire", "crypto", "edge"},
    "swarm": BASE | {"wire", "crypto"},
    # 3: roles
    "server": BASE | {"wire", "crypto", "routing", "scheduler", "tensors", "history", "edge",
                      "verification", "model", "engine", "swarm"},
    "client": BASE | {"wire", "crypto", "routing", "tensors", "history", "edge",
                      "verification", "model", "swarm"},
    "gateway": BASE | {"wire", "model", "client"},
    # 4: commands
    "cli": BASE,
    "run_server": BASE | {"cli", "server"},
    "run_gateway": BASE | {"cli", "gateway"},
    "run_dht": BASE | {"cli", "crypto", "swarm"},
    "demo": BASE | {"cli", "client", "model"},
    "plan": BASE | {"cli", "client", "model", "routing"},
    "check": BASE | {"cli", "model", "engine"},
    "commands": BASE | {"cli", "plan", "routing", "tensors", "model", "swarm", "client", "gateway",
                        "server"},
    "simulation": BASE | {"cli", "routing", "scheduler"},
    "testing": BASE | {"wire", "crypto", "routing", "scheduler", "tensors", "edge",
                       "verification", "model", "engine", "swarm", "server", "client", "check"},
}  # fmt: skip

HEAVY = {
    "hivemind": {"swarm"},
    "torch": {
        "tensors",
        "history",
        "edge",
        "native",
        "model",
        "engine",
        "server",
        "client",
        "gateway",
        "testing",
        "demo",
        "check",
        "commands",
    },
    "transformers": {
        "model",
        "engine",
        "client",
        "gateway",
        "testing",
        "demo",
        "check",
        "commands",
    },
    "safetensors": {"model", "testing"},
    "pymoo": {"routing"},
    "fastapi": {"gateway"},
    "starlette": {"gateway"},
    "uvicorn": {"gateway"},
    "llguidance": {"gateway"},
    "prometheus_client": {"gateway", "server"},
    "matplotlib": {"plan"},
    "simpy": {"simulation"},
}

MODULES = sorted(SOURCE.rglob("*.py"))

MAX_LINES = 450
MAX_ATTRIBUTES = 15
LARGE_CLASSES = {
    # values: one field for each thing that a user may set, a peer sends, or a table shows
    "config.client.ClientConfig": "one setting per field",
    "config.gateway.GatewayConfig": "one setting per field",
    "config.server.ServerConfig": "one setting per field",
    "gateway.metrics.Metrics": "one metric per attribute",
    "gateway.text.TextRequest": "one parameter of a text per field",
    "gateway.protocol.SamplingRequest": "one parameter of the API per field",
    "plan.command.PlanConfig": "one setting per field",
    "engine.config.EngineStats": "one reported number per field",
    "simulation.summary.Summary": "one column of a table per field",
    "swarm.records.ServerBody": "what a server announces, as it is sent",
    "types.ServerInfo": "what a server announces",
    "wire.frame.FrameHeader": "what a frame's header holds, as it is sent",
    # objects that hold the state of one thing
    "client.planning.server_discovery.ServerDiscovery": "settings and the latest view",
    "client.ring.hop_connection.HopConnection": "a hop's streams, keys and what it has reported",
    "server.server.Server": "all the parts of a server",
    "engine.worker.Worker": "whatever the engine thread owns",
}
"""Classes with more than `MAX_ATTRIBUTES`, and why they are not split."""


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


def module_name(path: Path) -> str:
    """As an import statement names it, without `planetserve.`."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and under `TYPE_CHECKING` count too."""
    names = {module_name(path) for path in MODULES}
    imports: dict[str, set[str]] = {}
    for path in MODULES:
        if package_of(path) == "__init__":
            continue
        found = {name.removeprefix("planetserve.") for _, name in imported_names(path)}
        targets = {name if name in names else name.rpartition(".")[0] for name in found}
        imports[module_name(path)] = (targets & names) - {module_name(path)}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(SOURCE)): len(path.read_bytes().splitlines()) for path in MODULES
    }
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not long


def num_attributes(definition: ast.ClassDef) -> int:
    """How many attributes the objects of a class have: declared, or set by its own methods."""
    declared = {
        node.target.id
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if "ClassVar" not in ast.unparse(node.annotation)
    }
    assigned = {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    return len(declared | assigned)


def test_no_class_has_too_many_attributes() -> None:
    large = {
        f"{module_name(path)}.{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ClassDef) and num_attributes(node) > MAX_ATTRIBUTES
    }
    assert large - set(LARGE_CLASSES) == set(), "split these, or say in LARGE_CLASSES why not"
    assert set(LARGE_CLASSES) - large == set(), "these are small now; LARGE_CLASSES has them still"


ONE_DOOR = ("routing.exact", "routing.evolution")


def test_packages_with_one_door_are_entered_by_it() -> None:
    inner = {module_name(path) for path in MODULES if module_name(path).startswith(ONE_DOOR)}
    inner -= set(ONE_DOOR)
    for path in MODULES:
        for line, name in imported_names(path):
            owner = name.removeprefix("planetserve.")
            owner = owner if owner in inner else owner.rpartition(".")[0]
            door = owner.rpartition(".")[0]
            assert owner not in inner or module_name(path).startswith(door), f"{path}:{line}"
