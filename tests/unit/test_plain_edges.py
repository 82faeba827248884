"""`benchmarks/plain_edges.py`: what stands for protected edges where protection is measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import planetserve
from planetserve.edge import receiver
from planetserve.edge.chunk import StepChunk
from planetserve.edge.receiver import StepReceiver
from planetserve.edge.sender import StepSender
from planetserve.errors import DecryptionFailed
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice, StepTable

SESSION, SECRET = bytes(16), bytes(32)
TABLE = StepTable((RowSlice(0, 7, 2),))
HIDDEN_TD = torch.arange(8, dtype=torch.float32).view(2, 4)


@pytest.fixture
def plain_edges(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    # What `use` replaces is put back after the test.
    monkeypatch.setattr(StepSender, "__init__", StepSender.__init__)
    monkeypatch.setattr(receiver, "EdgeOpener", receiver.EdgeOpener)
    return importlib.import_module("plain_edges")


def sent() -> tuple[Any, bytearray]:
    sender = StepSender(SESSION, torch.float32)
    sender.start(bytearray(SECRET), 1, 0, (4, 8), 0.0)
    header, payload = sender.seal(StepChunk(0, 0, 1, 0, TABLE, HIDDEN_TD), 0.0)
    return header, bytearray(payload if isinstance(payload, bytes) else b"".join(payload))


def new_receiver() -> StepReceiver:
    end = StepReceiver(SESSION, 1, 4, torch.float32, num_rows=1, span=BlockSpan(4, 8))
    end.start(bytearray(SECRET), 0)
    return end


def test_both_ends_switch_together(plain_edges: ModuleType) -> None:
    frames = {}
    for kind in ("sealed", "plain", "sealed"):
        plain_edges.use(kind)
        header, payload = frames[kind] = sent()
        assert (HIDDEN_TD.numpy().tobytes() in payload) is (kind == "plain")
        end = new_receiver()
        chunk = end.open(header, payload)
        assert chunk is not None
        assert torch.equal(chunk.hidden_TD, HIDDEN_TD)
        with pytest.raises(DecryptionFailed):
            end.open(header, payload)
    with pytest.raises(DecryptionFailed):
        new_receiver().open(*frames["plain"])


def test_nothing_in_the_product_can_turn_encryption_off() -> None:
    source = Path(planetserve.__file__).parent
    modules = [path for path in source.rglob("*.py") if "testing" not in path.parts]
    names = ("PlainSealer", "PlainOpener", "plain_edges", "new_sealer=")
    users = [path.name for path in modules if any(name in path.read_text() for name in names)]
    assert users == []
