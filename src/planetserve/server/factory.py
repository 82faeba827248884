"""The parts of a server as its settings want them, each checked before it is made.

Files, device, place in the swarm and engine; how they work together is in `server.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import torch

from planetserve.clock import SystemClock
from planetserve.config import ServerConfig
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.engine.span_runner import SpanRunner
from planetserve.errors import ConfigError
from planetserve.model.capabilities import check_servable, has_recurrent_layers
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.linear import convert_span
from planetserve.model.malloc_tuning import returning_freed_memory
from planetserve.model.quantization import STORED
from planetserve.model.span_blocks import SpanBlocks
from planetserve.model.stored_linear import can_keep
from planetserve.model.text_config import shares_kv_heads, text_config
from planetserve.swarm.libp2p.node import NodeConfig


def open_checkpoint(config: ServerConfig) -> Checkpoint:
    """The model, which must be one that servers can serve."""
    checkpoint = Checkpoint.open(
        config.model, revision=config.revision, token=config.token, cache_dir=config.cache_dir
    )
    check_servable(checkpoint)
    return checkpoint


def check_span(config: ServerConfig, checkpoint: Checkpoint) -> None:
    """Refuse blocks that the model has not.

    Raises:
        ConfigError: the message names the setting.
    """
    wanted = config.block_indices.end if config.block_indices else config.num_blocks or 0
    if wanted > checkpoint.num_blocks:
        flag = "--block_indices" if config.block_indices else "--num_blocks"
        raise ConfigError(
            f"{flag} {config.block_indices or config.num_blocks} is outside "
            f"{checkpoint.name}, which has blocks 0:{checkpoint.num_blocks}"
        )


def device_named(name: str) -> torch.device:
    """Where to compute.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no torch device; give cpu, cuda or mps") from error
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ConfigError(f"--device {name}: this machine has none that torch can use; try cpu")
    return device


def with_quant_type(
    config: ServerConfig, checkpoint: Checkpoint, device: torch.device
) -> ServerConfig:
    """The settings with `quant_type` decided, if it is `auto`.

    Raises:
        ConfigError: stored numbers cannot be kept here.
    """
    if config.quant_type not in ("auto", STORED):
        return config
    is_stored = checkpoint.quantization() is not None
    if is_stored and can_keep(device):
        return dataclasses.replace(config, quant_type=STORED)
    if config.quant_type == STORED:
        reason = (
            f"there are no kernels for stored weights on {device.type}"
            if is_stored
            else f"{checkpoint.name} is not stored quantised"
        )
        raise ConfigError(f"--quant_type stored: {reason}; leave the flag out")
    return dataclasses.replace(config, quant_type="none")


def node_config(config: ServerConfig) -> NodeConfig:
    """How the server joins the swarm."""
    return NodeConfig(
        initial_peers=config.initial_peers,
        host_maddrs=config.host_maddrs,
        announce_maddrs=config.announce_maddrs,
        port=config.port,
        public_ip=config.public_ip,
        identity_path=config.identity_path,
        daemon_startup_timeout_s=config.daemon_startup_timeout,
        max_peer_lookups=config.max_peer_lookups,
        peer_lookup_burst=config.peer_lookup_burst,
    )


def engine_config_of(config: ServerConfig, checkpoint: Checkpoint) -> EngineConfig:
    """The engine's settings, of which some follow from the model."""
    shares = shares_kv_heads(checkpoint.config)
    has_states = has_recurrent_layers(text_config(checkpoint.config))
    return EngineConfig(
        attn_cache_tokens=config.cache_tokens(shares_kv_heads=shares, has_states=has_states),
        page_size=config.page_size,
        state_snapshots=config.state_snapshots,
        max_batch_tokens=config.max_batch_size,
        prefill_slowdown=config.prefill_slowdown,
        batch_delay_factor=config.batch_delay_factor,
        inference_max_length=config.session_tokens(shares_kv_heads=shares),
        attention_backend=config.attention_backend,
        num_threads=config.num_threads,
        max_peer_share=config.max_peer_kv_share,
        kv_overcommit=config.kv_overcommit,
        check_finite=True,
    )


def build_engine(
    load: Callable[[], SpanBlocks], linear_backend: str, config: EngineConfig
) -> Engine:
    """The engine on the blocks that `load` returns, running and measured. Takes a while.

    Raises:
        ConfigError: they do not fit into the machine's memory.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    try:
        with returning_freed_memory():
            blocks = load()
            convert_span(blocks, linear_backend)
        runner = SpanRunner(
            blocks,
            config.num_pages,
            config.page_size,
            config.attention_backend,
            state_snapshots=config.state_snapshots,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            "this machine's memory is too small for these blocks and their KV cache; serve fewer "
            "with --num_blocks, or give --quant_type int8 or a smaller --attn_cache_tokens"
        ) from error
    engine = Engine(runner, config, SystemClock())
    engine.start()
    try:
        asyncio.run(engine.measure())
    except BaseException:
        engine.close()
        raise
    return engine
