"""Tiny models for the engine's tests, each made once per run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import OVERRIDES, Tiny
from transformers import AutoModelForCausalLM

from planetserve.testing.checkpoints import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """`tiny(family)`, made once."""
    made: dict[str, Tiny] = {}

    def make(family: str) -> Tiny:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            make_tiny_checkpoint(folder, family, **OVERRIDES.get(family, {}))
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            made[family] = Tiny(model, folder)
        return made[family]

    return make
