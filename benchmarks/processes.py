"""What benchmarks set up alike: a random model, and a swarm of processes on this machine."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from planetserve.demo import LOOPBACK, Child, Children, split_blocks


def prepare() -> None:
    """One thread, no chatter, and no server left behind when this process is told to stop."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def make_checkpoint(folder: Path, shape: Mapping[str, Any]) -> Path:
    """A random Llama, the same each time, that never ends a text by itself."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@contextmanager
def children() -> Iterator[Children]:
    """Processes that end with the block, as does the folder for what they write."""
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-") as folder:
        started = Children(Path(folder))
        try:
            yield started
        finally:
            started.stop()


def start_bootstrap(started: Children) -> list[str]:
    """A peer to join the swarm through; its addresses."""
    bootstrap = started.start("bootstrap", "planetserve.run_dht", "--host_maddrs", LOOPBACK)
    addresses: list[str] = bootstrap.wait_ready()["addresses"]
    return addresses


def start_servers(
    started: Children, checkpoint: Path, num_blocks: int, num_servers: int, *flags: str,
    module: str = "planetserve.run_server",
) -> list[Child]:  # fmt: skip
    """Servers of one thread that share the blocks evenly."""
    servers = []
    for span in split_blocks(num_blocks, num_servers):
        # One after the other: what a server measures while it starts is announced.
        server = started.start(
            f"server {span}", module, str(checkpoint), "--block_indices", str(span),
            "--host_maddrs", LOOPBACK, "--num_threads", "1", *flags,
        )  # fmt: skip
        server.wait_ready()
        servers.append(server)
    return servers
