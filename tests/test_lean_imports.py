"""Packages that decide must not load what computes: each import runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch", "transformers", "hivemind", "pymoo", "matplotlib", "rich.console", "simpy", "fastapi",
    "uvicorn", "prometheus_client",
)  # fmt: skip

LEAN = [
    "planetserve",
    "planetserve.types",
    "planetserve.errors",
    "planetserve.config",
    "planetserve.registry",
    "planetserve.clock",
    "planetserve.cli",
    "planetserve.run_server",
    "planetserve.run_dht",
    "planetserve.run_gateway",
    "planetserve.demo",
    "planetserve.plan",
    "planetserve.check",
    "planetserve.simulation",
    "planetserve.commands.status",
    "planetserve.commands.estimate",
    "planetserve.commands.generate",
    "planetserve.commands.chat",
    "planetserve.commands.doctor",
    "planetserve.wire.frame",
    "planetserve.wire.step",
    "planetserve.wire.messages",
    "planetserve.crypto",
    "planetserve.routing",
    "planetserve.routing.optimizers",
    "planetserve.routing.placement",
    "planetserve.scheduler",
    "planetserve.scheduler.scheduler",
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", LEAN)
def test_import_loads_nothing_heavy(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*[n for n in {HEAVY} if n in sys.modules])")
    assert loaded == ""


def test_public_values_load_nothing_heavy() -> None:
    names = "BlockSpan, Chain, ClientConfig, Hop, MissingBlocksError, ServerConfig, ServerInfo"
    code = f"import sys; from planetserve import {names}"
    assert run(f"{code}; print(*[n for n in {HEAVY} if n in sys.modules])") == ""


def test_client_does_not_load_the_server() -> None:
    code = "import sys, planetserve.client.hf.from_pretrained"
    loaded = run(f"{code}; print(*[n for n in sys.modules if n.startswith('planetserve.')])")
    assert not [
        name for name in loaded.split() if name.split(".")[1] in ("engine", "server", "scheduler")
    ]
