"""Shared by the engine's tests: one thread for torch, and tiny models loaded once per session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import load_span, make_model
from transformers import PreTrainedModel

from planetserve.model.skeleton import SpanBlocks


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[PreTrainedModel, SpanBlocks]]:
    """`tiny(family)`: the model in plain transformers and a freshly loaded span of it."""
    models: dict[str, PreTrainedModel] = {}

    def load(family: str) -> tuple[PreTrainedModel, SpanBlocks]:
        if family not in models:
            models[family] = make_model(family)
        folder = tmp_path_factory.mktemp(family)
        return models[family], load_span(models[family], folder, torch.float32)

    return load
