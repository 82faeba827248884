"""Streamers that do something to the swarm in the middle of a text."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from planetserve.testing.swarm import LocalSwarm


class StopServerAt(BaseStreamer):
    """Closes the server of one hop after some tokens."""

    def __init__(self, model: Any, swarm: LocalSwarm, hop: int, after: int):
        self.model, self.swarm, self.hop, self.after = model, swarm, hop, after
        self.stopped: str | None = None

    def put(self, value: torch.Tensor) -> None:
        self.after -= 1
        if self.after == 0:
            self.stopped = self.model.chain.hops[self.hop].peer_id
            (server,) = [s for s in self.swarm.servers if s.node.peer_id == self.stopped]
            self.swarm.stop_server(server)

    def end(self) -> None:
        return
