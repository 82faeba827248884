"""Old paths of modules that have moved. Importing one gives the module of now, with a warning.

`MovedModules` stands last on `sys.meta_path`, so that Python asks it only for modules that do not
exist, and programs that use none of the old paths never get here.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "planetserve."

MOVED = {
    "client.active": "client.hf.active_session",
    "client.auto": "client.hf.from_pretrained",
    "client.bans": "client.planning.bans",
    "client.block_ranges": "client.planning.block_ranges",
    "client.chain_manager": "client.planning.chain_manager",
    "client.conversation": "client.hf.conversation",
    "client.experience": "client.planning.latency_feedback",
    "client.families": "client.hf.petals_aliases",
    "client.generation": "client.hf.generation",
    "client.local_blocks": "client.hf.local_blocks",
    "client.module": "client.hf.module",
    "client.no_chain": "client.planning.chain_diagnosis",
    "client.options": "client.hf.options",
    "client.portal": "client.event_loop_thread",
    "client.quarrels": "client.planning.edge_suspicion",
    "client.relocation": "client.planning.session_migration",
    "client.remote_blocks": "client.hf.remote_blocks",
    "client.remote_cache": "client.hf.remote_cache",
    "client.reports": "client.planning.peer_reports",
    "client.scout": "client.planning.replanner",
    "client.shared_head": "client.hf.batched_lm_head",
    "client.swarm_view": "client.planning.server_discovery",
    "client.turn": "client.hf.turn",
    "client.vigil": "client.ring.stall_detector",
    "engine.attention_choice": "engine.attention_selector",
    "engine.inputs": "engine.recompute_inputs",
    "engine.transfers": "engine.pinned_copy",
    "model.heap": "model.malloc_tuning",
    "model.skeleton": "model.span_blocks",
    "model.sources": "model.file_sources",
    "routing.evolution.first": "routing.evolution.initial_population",
    "routing.evolution.walks": "routing.evolution.label_front",
    "routing.moving": "routing.migration",
    "routing.points": "routing.server_points",
    "routing.walk": "routing.greedy_walk",
    "scheduler.chunk_budget": "scheduler.prefill_budget",
    "scheduler.gathering": "scheduler.batch_delay",
    "scheduler.leases": "scheduler.kv_reservations",
    "scheduler.sequence": "scheduler.kv_row",
    "server.counters": "server.refusal_log",
    "server.gate": "server.backpressure",
    "server.journal": "edge.replay_buffer",
    "server.outlet": "server.downstream",
    "swarm.averages": "swarm.ewma",
    "swarm.buckets": "swarm.rate_limit",
    "swarm.calls": "swarm.libp2p.unary_rpc",
    "swarm.daemon": "swarm.libp2p.daemon",
    "swarm.delimited": "swarm.libp2p.delimited",
    "swarm.guards": "swarm.dht.hivemind_limits",
    "swarm.lean_hivemind": "swarm.dht.lean_hivemind",
    "swarm.node": "swarm.libp2p.node",
    "swarm.peer_routing": "swarm.libp2p.peer_routing",
    "swarm.rates": "swarm.bandwidth",
    "swarm.sockets": "swarm.libp2p.sockets",
    "swarm.streams": "swarm.libp2p.streams",
}
"""Old path -> new path, both below `planetserve`."""


class MovedModules:
    """A finder that loads the new module for an old path."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder.find_spec`."""
        new = MOVED.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) else None
        if new is None:
            return None
        return ModuleSpec(name, _Loader(_PACKAGE + new))  # type: ignore[arg-type] # has its methods


class _Loader:
    def __init__(self, new: str):
        self._new = new
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self._new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(self._new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has put the spec of the old path there.
        module.__spec__ = self._spec
