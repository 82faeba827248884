"""Server and client of a simulated swarm: the production classes around an integer model."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PretrainedConfig
from typing_extensions import override

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.config import ClientConfig, ServerConfig
from planetserve.crypto.identity import Identity
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.server.server import Server
from planetserve.swarm.libp2p.node import NodeConfig
from planetserve.swarm.network import Network
from planetserve.testing.integer_model import WIDTH, IntegerRunner, LoopEngine
from planetserve.testing.lies import new_lying_sender
from planetserve.testing.memory_network import MemoryNetwork, MemoryNode
from planetserve.testing.virtual_time import ClockError, VirtualClock
from planetserve.types import BlockSpan

MODEL = "integers"
FINGERPRINT = "1" * 64


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """A server as it starts, and starts again."""

    identity: Identity
    span: BlockSpan
    num_pages: int
    page_size: int
    block_s: float
    clock: ClockError
    max_chunk_tokens: int
    overcommit: float
    update_period_s: float


class SimulatedServer(Server):
    """A server whose span is of the integer model."""

    block_s: float = 0.001

    @classmethod
    async def launch(
        cls,
        network: MemoryNetwork,
        plan: ServerPlan,
        num_blocks: int,
        rng: random.Random,
        *,
        receipts: bool = False,
    ) -> SimulatedServer:
        """Join the swarm and begin to serve."""
        config = ServerConfig(
            model=MODEL,
            block_indices=plan.span,
            new_swarm=True,
            attn_cache_tokens=plan.num_pages * plan.page_size,
            page_size=plan.page_size,
            inference_max_length=512,
            max_batch_size=plan.max_chunk_tokens,
            max_peer_kv_share=1.0,
            kv_overcommit=plan.overcommit,
            update_period=plan.update_period_s,
            step_timeout=90.0,
            receipts=receipts,
        )
        heads = PretrainedConfig(num_attention_heads=1, num_key_value_heads=1)
        checkpoint: Any = SimpleNamespace(
            name=MODEL,
            model_prefix=MODEL,
            fingerprint=FINGERPRINT,
            manifest=None,
            quantization=lambda: None,
            num_blocks=num_blocks,
            config=heads,
        )
        node = network.join(plan.identity, plan.clock)
        server = cls(config, checkpoint, node, node.machine_clock, rng)
        server.block_s = plan.block_s
        await server.begin(torch.float32, torch.device("cpu"))
        server.handler.shared = dataclasses.replace(
            server.handler.shared, new_sender=new_lying_sender(lambda: node.liar)
        )
        return server

    @property
    def memory_node(self) -> MemoryNode:
        """Its node."""
        if not isinstance(self.node, MemoryNode):
            raise TypeError("a node of another kind")
        return self.node

    @override
    async def _load_engine(self, config: EngineConfig, device: torch.device) -> Engine:
        loop = self.memory_node.loop
        runner = IntegerRunner(self.span, config.num_pages, config.page_size, loop, self.block_s)
        engine = LoopEngine(runner, config, self.memory_node.machine_clock)
        engine.start()
        await engine.measure()
        return engine


def new_manager(
    network: MemoryNetwork,
    config: ClientConfig,
    identity: Identity,
    error: ClockError,
    num_blocks: int,
    rng: random.Random,
) -> ChainManager:
    """A client's chain manager, which joins the swarm when it starts."""
    facts = ModelFacts(MODEL, MODEL, FINGERPRINT, num_blocks, WIDTH, torch.float32)

    async def join(_: NodeConfig) -> Network:
        return network.join(identity, error)

    return ChainManager(config, facts, VirtualClock(network.loop, error), rng, join)
