"""What the pages say exists: commands parse, flags are known, files and links are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from planetserve import check, cli, demo, plan, run_dht, run_gateway, run_server, simulation
from planetserve.check import command as check_command
from planetserve.commands import chat, doctor, estimate, generate, status
from planetserve.config import ClientConfig, GatewayConfig, ServerConfig
from planetserve.plan import command as plan_command
from planetserve.simulation import command as simulate_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
PARSERS = {
    "planetserve.run_server": run_server.parse,
    "planetserve.run_dht": run_dht.parse,
    "planetserve.run_gateway": run_gateway.parse,
    "planetserve.demo": demo.parse,
    "planetserve.plan": plan.parse,
    "planetserve.check": check.parse,
    "planetserve.simulation": simulation.parse,
    "planetserve.commands.status": status.parse,
    "planetserve.commands.estimate": estimate.parse,
    "planetserve.commands.generate": generate.parse,
    "planetserve.commands.chat": chat.parse,
    "planetserve.commands.doctor": doctor.parse,
}

EXAMPLES = (
    run_server.EXAMPLES,
    run_dht.EXAMPLES,
    run_gateway.EXAMPLES,
    plan_command.EXAMPLES,
    check_command.EXAMPLES,
    simulate_command.EXAMPLES,
    status.EXAMPLES,
    estimate.EXAMPLES,
    generate.EXAMPLES,
    chat.EXAMPLES,
    doctor.EXAMPLES,
)


def shell_commands(text: str) -> list[str]:
    """Lines of the page's shell blocks, with continuations joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


COMMANDS = sorted(
    line.strip()
    for text in [*TEXTS.values(), *(f"```sh\n{examples}```" for examples in EXAMPLES)]
    for line in shell_commands(text)
    if re.match(r"\s*(python -m planetserve\.|planetserve )", line)
)


def test_the_pages_show_how_to_start_everything() -> None:
    shown = {line.split()[2] for line in COMMANDS if line.startswith("python")}
    assert {"planetserve.run_server", "planetserve.run_dht"} <= shown


@pytest.mark.parametrize("line", COMMANDS)
def test_a_shown_command_is_accepted(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "planetserve":
        words = ["python", "-m", cli.COMMANDS[words[1]][0], *words[2:]]
    PARSERS[words[2]](words[3:])


@pytest.mark.parametrize("page", TEXTS)
def test_flags_in_the_text_exist(page: str) -> None:
    known = {*ServerConfig.__dataclass_fields__, *run_dht.DhtConfig.__dataclass_fields__}
    known |= {*GatewayConfig.__dataclass_fields__}
    known |= {*plan_command.PlanConfig.__dataclass_fields__}
    known |= {*check_command.CheckConfig.__dataclass_fields__}
    known |= {*simulate_command.SimulateConfig.__dataclass_fields__}
    for config in (status.StatusConfig, estimate.EstimateConfig, generate.GenerateConfig,
                   chat.ChatConfig, doctor.DoctorConfig):  # fmt: skip
        known |= {*config.__dataclass_fields__}
    known |= {*demo.Options.__dataclass_fields__, "config", "help", "version"}
    for name in ("engine", "kv_memory"):
        benchmark = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        known |= {*re.findall(r'add(?:_argument)?\("--([a-z_]+)"', benchmark)}
    script = (ROOT / "scripts" / "simulate_faults.py").read_text(encoding="utf-8")
    known |= {name.replace("-", "_") for name in re.findall(r'"--([a-z-]+)"', script)}
    other = {
        "rm",
        "durations",
        "gpus",
        "edge",
        "inplace",
    }  # of docker, pytest, setuptools, a drawing
    named = re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", TEXTS[page])
    assert {name.replace("-", "_") for name in named} <= known | other


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files(page: str) -> None:
    folder = next(path.parent for path in PAGES if path.name == page)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXTS[page])
    missing = [link for link in links if "://" not in link and not (folder / link).exists()]
    assert missing == []


def test_paths_in_the_architecture_page_exist() -> None:
    package = ROOT / "src" / "planetserve"
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", TEXTS["ARCHITECTURE.md"]))
    assert len(named) > 20
    missing = [name for name in named if not (package / name).exists()]
    assert [name for name in missing if not (ROOT / name).exists()] == []


def test_client_options_in_the_readme_exist() -> None:
    named = ("allowed_servers", "blocked_servers", "local_blocks", "max_retries", "step_timeout",
             "trusted_servers")  # fmt: skip
    for name in named:
        assert f"`{name}`" in TEXTS["README.md"]
        assert name in ClientConfig.__dataclass_fields__


def test_every_command_is_in_the_readme() -> None:
    for name, (module, _) in cli.COMMANDS.items():
        assert f"planetserve {name}" in TEXTS["README.md"]
        assert module in TEXTS["README.md"]
