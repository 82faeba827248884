"""A tiny random Llama, a swarm that serves it in overlapping spans, and the local model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
from commands import Command
from transformers import AutoModelForCausalLM

from planetserve import AutoDistributedModelForCausalLM
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm

SPANS = ("0:2", "2:5", "4:6")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The web page is tested where a browser is installed, and in continuous integration."""
    is_left_out = browser.LACKS and not browser.MUST_RUN
    return True if is_left_out and collection_path.name == "test_page.py" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if browser.LACKS and not browser.MUST_RUN:
        lacks = ", ".join(browser.LACKS)
        terminalreporter.write_line(f"tests of the web page (tests/e2e/test_page.py) need {lacks}")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 6-block random Llama with grouped-query attention, float32."""
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_checkpoint(folder, "llama", seed=1, num_hidden_layers=6)
    return folder


@pytest.fixture(scope="session")
def local(llama_folder: Path) -> Any:
    """The same model in one piece."""
    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def swarm(llama_folder: Path) -> Iterator[LocalSwarm]:
    """Three servers whose spans overlap at block 4."""
    with LocalSwarm(str(llama_folder), SPANS) as running:
        yield running


@pytest.fixture(scope="session")
def model(swarm: LocalSwarm, llama_folder: Path) -> Iterator[Any]:
    """The distributed model."""
    with AutoDistributedModelForCausalLM.from_pretrained(
        str(llama_folder), initial_peers=swarm.initial_peers, torch_dtype=torch.float32
    ) as loaded:
        yield loaded


@pytest.fixture
def prompt() -> torch.Tensor:
    """Twelve tokens."""
    return torch.randint(5, 90, (1, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """Three left-padded prompts of unequal lengths, with their mask."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(5, 90, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((11, 4, 7)):
        ids[row, : 11 - length] = 0
        mask[row, : 11 - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def started() -> Iterator[list[Command]]:
    """Commands put into this list are ended after the test."""
    commands: list[Command] = []
    yield commands
    for command in commands:
        command.end()
