"""`planetserve simulate`: what it prints, what it refuses; and the scenarios that come with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("simpy")

from planetserve.errors import ConfigError
from planetserve.simulation import main
from planetserve.simulation.scenario import load_scenario, scenario_names
from planetserve.simulation.world import World

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "scenarios"
QUICK = ["--scenario", "home_4", "--duration_s", "60", "--seeds", "2"]


def test_the_scenarios_are_those_of_the_help() -> None:
    names = {"home_4", "city_14", "continent_100", "planet_1000", "planet_10000"}
    assert set(scenario_names()) == names


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_scenario_loads_and_says_where_its_figures_come_from(name: str) -> None:
    loaded = load_scenario(name)
    assert loaded.scenario.name == name
    assert loaded.scenario.sources
    assert loaded.gpus.sources
    if loaded.scenario.machines.count <= 100:
        World(loaded, 0)


def test_json_has_every_seed_and_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    main([*QUICK, "--optimizers", "random", "shortest_path", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1
    assert list(document["optimizers"]) == ["random", "shortest_path"]
    found = document["optimizers"]["shortest_path"]
    means = [seed["token_mean_ms"] for seed in found["seeds"]]
    assert len(means) == 2
    assert found["mean"]["token_mean_ms"] == pytest.approx(sum(means) / 2)
    assert found["half_interval_95"]["token_mean_ms"] > 0


def test_the_table_compares_with_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    main([*QUICK, "--optimizers", "random", "shortest_path"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("shortest_path"))
    assert " % " in row
    assert "-" in row.split("%")[0]  # faster than random


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "--scenario"),
        (["--scenario", "nowhere"], "home_4"),
        (["--scenario", "nowhere.yaml"], "nowhere.yaml"),
        ([*QUICK, "--optimizers", "best"], "choose one of"),
        ([*QUICK, "--requests_per_s", "0"], "positive"),
        ([*QUICK, "--requests_per_s", "1e9"], "requests"),
        ([*QUICK, "--seeds", "0"], "seeds"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_two(argv: list[str], text: str) -> None:
    command = [sys.executable, "-m", "planetserve.simulation", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert text in done.stderr


@pytest.mark.parametrize(
    ("section", "key", "value", "text"),
    [
        ("model", "num_blocks", 0, "model.num_blocks"),
        ("model", "colour", "red", "model.colour"),
        ("network", "hop_overhead_ms", float("nan"), "network.hop_overhead_ms"),
        ("machines", "mix", "nobody", "no mix"),
        ("machines", "count", 5, "counts 4 machines"),
        ("machines", "spans", ["0:4"], "placement fixed"),
        ("network", "cities", ["Atlantis"], "no city"),
        ("workload", "warmup_s", 1e6, "warmup_s"),
    ],
)
def test_a_wrong_scenario_says_where(
    tmp_path: Path, section: str, key: str, value: object, text: str
) -> None:
    document = yaml.safe_load((FOLDER / "home_4.yaml").read_text())
    document[section][key] = value
    (tmp_path / "tables").symlink_to(FOLDER / "tables")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match=text) as caught:
        load_scenario(str(path))
    assert str(path) in str(caught.value)


def test_machines_that_cannot_hold_the_model_are_refused(tmp_path: Path) -> None:
    document = yaml.safe_load((FOLDER / "home_4.yaml").read_text())
    document["model"]["num_blocks"] = 1000
    (tmp_path / "tables").symlink_to(FOLDER / "tables")
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match="hold no block"):
        World(load_scenario(str(path)), 0)
