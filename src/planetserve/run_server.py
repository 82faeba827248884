"""`python -m planetserve.run_server MODEL --block_indices 0:8 ...`: serve blocks of a model.

Reads the command line and nothing else; `planetserve.server` does the work, and is imported only
once the arguments are known to be good.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from planetserve import cli
from planetserve.config import ServerConfig
from planetserve.config.petals import IGNORED_FLAGS, OTHER_FLAGS, translate
from planetserve.types import BlockSpan

PROG = "python -m planetserve.run_server"

USAGE = """MODEL (--block_indices START:END | --num_blocks N)
         (--initial_peers ADDRESS... | --new_swarm) [more flags]"""

EXAMPLES = f"""examples:
  start a swarm with the first half of the demo model:
    {PROG} demo --block_indices 0:4 --new_swarm
  join it with the other half; use the address that the first server printed:
    {PROG} demo --block_indices 4:8 --initial_peers /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo...
"""

_UNUSED = ("scipy",)
"""Packages that transformers loads if they are there, for the losses of object detectors."""

GROUPS = {
    "model": ("model", "block_indices", "num_blocks", "torch_dtype", "quant_type", "device",
              "revision", "token", "cache_dir"),
    "swarm": ("initial_peers", "new_swarm", "dht_prefix", "identity_path", "public_name",
              "receipts"),
    "network": ("port", "public_ip", "host_maddrs", "announce_maddrs", "daemon_startup_timeout"),
    "capacity": ("attn_cache_tokens", "inference_max_length", "max_batch_size", "prefill_slowdown",
                 "batch_delay_factor", "page_size", "state_snapshots", "attention_backend",
                 "linear_backend",
                 "num_threads", "throughput", "network_mbps"),
    "limits": ("max_sessions", "max_peer_sessions", "max_peer_opens", "peer_open_burst",
               "max_peer_lookups", "peer_lookup_burst", "max_queued_mib", "max_peer_queued_mib",
               "max_peer_kv_share", "kv_overcommit"),
    "timing": ("update_period", "expiration", "session_timeout", "step_timeout"),
    "process": ("metrics_port", "ready_file", "log_level"),
}  # fmt: skip

EXCLUSIVE = (
    ("block_indices", "num_blocks"),
    ("initial_peers", "new_swarm"),
    ("port", "host_maddrs"),
    ("public_ip", "announce_maddrs"),
)


def parse(argv: Sequence[str] | None = None) -> ServerConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(
        PROG, USAGE, "Serve some decoder blocks of a model to everyone in a swarm.", EXAMPLES
    )
    cli.add_fields(parser, ServerConfig, GROUPS, positional=("model",))
    for name, (num_values, _) in IGNORED_FLAGS.items():
        parser.add_hidden(name, num_values)
    for name, count in OTHER_FLAGS.items():
        parser.add_hidden(name, count)
    return cli.parse_config(parser, ServerConfig, argv, EXCLUSIVE, adjust=translate)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP."""
    config = parse(argv)
    cli.setup_logging(config.log_level)

    quantises = config.quant_type in ("int8", "nf4")
    unused = _without(*_UNUSED, *([] if quantises else ["accelerate"]))
    with cli.ended_by_interrupts(), unused:
        from planetserve.server.server import Server, serve

    def on_ready(server: Server) -> None:
        addresses = server.node.addresses()
        cli.say(_join_text(config.model, server.span, addresses))
        if config.ready_file is not None:
            cli.write_ready_file(
                config.ready_file,
                peer_id=server.node.peer_id,
                addresses=addresses,
                start=server.span.start,
                end=server.span.end,
            )

    cli.run_until_signalled(lambda stop: serve(config, stop, on_ready))


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Let nothing that is imported here load these packages; scipy alone takes 36 MB.

    transformers takes them for missing from then on, so this is for a process that is a server and
    nothing else.
    """
    hidden = [name for name in names if name not in sys.modules]
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules.update(dict.fromkeys(hidden))  # None: the import system takes it for missing
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]


def _join_text(model: str, span: BlockSpan, addresses: Sequence[str]) -> str:
    """What a person needs to join this server with another one, or to use it."""
    quoted = ", ".join(f'"{address}"' for address in addresses)
    return "\n".join(
        [
            f"Serving blocks {span} of {model}. To join this swarm:",
            f"  {PROG} {model} --num_blocks N --initial_peers {' '.join(addresses)}",
            "To use it from Python:",
            f'  AutoDistributedModelForCausalLM.from_pretrained("{model}", '
            f"initial_peers=[{quoted}])",
        ]
    )


if __name__ == "__main__":
    cli.run(PROG, main)
