"""Old names of settings that users wrote keep working, with one warning that names the new one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from planetserve import run_server
from planetserve.config import ClientConfig, ServerConfig, check_mapping, from_mapping
from planetserve.config.old_names import CLIENT, OPTIONS, SERVER
from planetserve.errors import ConfigError
from planetserve.registry import Registry
from planetserve.routing.optimizers import OPTIMIZERS, create_optimizer
from planetserve.routing.optimizers.shortest_path import ShortestPath
from planetserve.simulation.client import Policy

NEEDED = {"model": "demo", "num_blocks": 1, "new_swarm": True}
SERVE = ["demo", "--num_blocks", "1", "--new_swarm"]
RENAMED = [
    *((ClientConfig, {}, old, new) for old, new in CLIENT.renamed.items()),
    *((ServerConfig, NEEDED, old, new) for old, new in SERVER.renamed.items()),
]


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    return caplog.text


@pytest.mark.parametrize(("cls", "needed", "old", "new"), RENAMED)
@pytest.mark.parametrize("build", ["constructor", "mapping"])
def test_an_old_setting_means_the_new_one(
    caplog: pytest.LogCaptureFixture, cls: Any, needed: Any, old: str, new: str, build: str
) -> None:
    given = {**needed, old: 0.25}
    config = cls(**given) if build == "constructor" else from_mapping(cls, given)
    assert getattr(config, new) == getattr(config, old) == 0.25
    assert f"{old} is the old name of {new}; write {new}" in only_warning(caplog)


@pytest.mark.parametrize(("cls", "needed", "old", "new"), RENAMED)
def test_both_names_are_an_error(cls: Any, needed: Any, old: str, new: str) -> None:
    for build in (cls, lambda **given: from_mapping(cls, given)):
        with pytest.raises(ConfigError, match=f"{old} is the old name of {new}; give only {new}"):
            build(**needed, **{old: 0.25, new: 0.25})


@pytest.mark.parametrize(("cls", "needed"), [(ClientConfig, {}), (ServerConfig, NEEDED)])
def test_a_setting_without_effect_is_accepted(
    caplog: pytest.LogCaptureFixture, cls: Any, needed: Any
) -> None:
    config = from_mapping(cls, {**needed, "request_timeout": 5})
    assert config == cls(**needed)
    assert "request_timeout has no effect" in only_warning(caplog)
    assert config.request_timeout == 180


def test_current_names_are_no_reason_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    ClientConfig(chain_load_prior=0.5, chain_cost_jitter=0.0)
    run_server.parse(SERVE)
    ShortestPath(cost_jitter=0.1, load_prior=0.1)
    assert not caplog.records


def test_values_are_checked_under_the_new_name() -> None:
    with pytest.raises(ConfigError, match="chain_load_prior='much' is not a number"):
        from_mapping(ClientConfig, {"chain_doubt": "much"})
    assert check_mapping(ClientConfig, {"chain_doubt": 1}) == {"chain_load_prior": 1.0}


def test_old_flags_are_read_and_hidden(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_server.parse([*SERVE, "--batch-patience", "0.25", "--request_timeout=9"])
    assert config.batch_delay_factor == 0.25
    assert "--batch_patience is the old name of batch_delay_factor" in caplog.text
    assert "--request_timeout has no effect" in caplog.text
    assert len(caplog.records) == 2
    with pytest.raises(SystemExit):
        run_server.parse(["--help"])
    listed = capsys.readouterr().out
    assert "batch_patience" not in listed
    assert "request_timeout" not in listed


def test_a_flag_overrides_the_old_name_in_a_file(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("batch_patience: 0.25\nrequest_timeout: 9\n")
    assert run_server.parse([*SERVE, "-c", str(file)]).batch_delay_factor == 0.25
    assert f"{file}: batch_patience is the old name of batch_delay_factor" in caplog.text
    both = [*SERVE, "-c", str(file), "--batch_delay_factor", "0.75"]
    assert run_server.parse(both).batch_delay_factor == 0.75


OLD_TEXT = "shortest_path:doubt=0.25, spread=0"


def test_old_options_of_an_optimizer_mean_the_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    made = OPTIMIZERS.create_from(OLD_TEXT, cost_jitter=0.5, load_prior=0.5)
    assert vars(made) == vars(ShortestPath(cost_jitter=0, load_prior=0.25))
    assert [record.getMessage() for record in caplog.records] == [
        f"shortest_path:{old} is the old name of {new}; write {new}"
        for old, new in OPTIONS["shortest_path"].renamed.items()
    ]
    caplog.clear()
    assert vars(ShortestPath(spread=0, doubt=0.25)) == vars(made)  # type: ignore[call-arg]
    assert len(caplog.records) == 2


def test_both_names_of_an_option_are_an_error() -> None:
    text = "shortest_path:doubt=0.25,load_prior=0.5"
    for read in (OPTIMIZERS.create_from, Policy.parse, lambda t: ClientConfig(chain_optimizer=t)):
        with pytest.raises(ConfigError, match="doubt is the old name of load_prior"):
            read(text)


def test_settings_warn_of_old_options_once_however_often_chains_are_planned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = [
        ClientConfig(chain_optimizer=OLD_TEXT).chain_optimizer,
        Policy.parse(OLD_TEXT).optimizer,
    ]
    assert len(caplog.records) == 4
    for text in texts:
        assert text == "shortest_path:load_prior=0.25,cost_jitter=0"
        create_optimizer(text, cost_jitter=0.1, load_prior=0.0, seed=1)
    assert len(caplog.records) == 4


def test_other_optimizers_keep_options_of_these_names(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer of somebody else that was written for the old names is offered them."""

    def theirs(spread: float = 9.0, doubt: float = 9.0) -> Any:
        return spread, doubt

    found = Registry[Any]("chain optimizer", "chain_optimizers", {"theirs": "planetserve:theirs"})
    monkeypatch.setattr("planetserve.theirs", theirs, raising=False)
    monkeypatch.setattr("planetserve.routing.optimizers.OPTIMIZERS", found)
    assert create_optimizer("theirs:doubt=1", cost_jitter=0.1, load_prior=0.2, seed=1) == (0.1, 1)
    assert ClientConfig(chain_optimizer="theirs:doubt=1").chain_optimizer == "theirs:doubt=1"
    assert not caplog.records
