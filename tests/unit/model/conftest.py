"""Tiny checkpoints shared by the tests of the model package."""

from __future__ import annotations

from pathlib import Path

import pytest

from planetserve.testing.checkpoints import make_tiny_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several shards with an index file; not to be changed."""
    folder = tmp_path_factory.mktemp("llama")
    return make_tiny_checkpoint(folder, "llama", max_shard_size="40KB")
