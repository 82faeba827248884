"""`python -m planetserve.run_gateway`: OpenAI's API over HTTP, answered by a swarm.

torch, transformers, hivemind and the web server are imported only once the arguments are known to
be good.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planetserve import cli
from planetserve.config import GatewayConfig
from planetserve.errors import ConfigError

if TYPE_CHECKING:
    from planetserve.gateway.server import Address

PROG = "python -m planetserve.run_gateway"

USAGE = "MODEL --initial_peers ADDRESS... [--port N] [--host HOST --api_key KEY] [more flags]"

EXAMPLES = f"""examples:
  answer programs on this machine, at http://127.0.0.1:8000/v1:
    {PROG} demo --initial_peers /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo...
  answer other machines too, with a key:
    {PROG} demo --initial_peers /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo... \\
        --host 0.0.0.0 --api_key secret
"""

GROUPS = {
    "model": ("model", "dtype", "device", "revision", "token", "cache_dir", "served_model_name",
              "served_model", "chat_template", "response_template", "generation_config"),
    "HTTP": ("host", "port", "api_key", "api_key_file", "max_body_mib", "shutdown_timeout"),
    "limits": ("max_model_len", "max_num_seqs", "max_num_queued_reqs", "max_logprobs",
               "max_warm_sessions", "warm_session_timeout"),
    "swarm": ("initial_peers", "dht_prefix", "allowed_servers", "blocked_servers",
              "trusted_servers", "trusted_blocks", "receipts", "chain_optimizer",
              "show_route"),
    "timing": ("daemon_startup_timeout", "connect_timeout", "step_timeout", "update_period",
               "max_retries", "min_backoff", "max_backoff", "wait_for_blocks_timeout"),
    "process": ("ready_file", "log_level"),
}  # fmt: skip

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def parse(argv: Sequence[str] | None = None) -> GatewayConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(
        PROG, USAGE, "Answer OpenAI's API over HTTP with a model that a swarm serves.", EXAMPLES
    )
    cli.add_fields(parser, GatewayConfig, GROUPS, positional=("model",))
    config = cli.parse_config(parser, GatewayConfig, argv)
    if not config.initial_peers:
        raise ConfigError(
            "no --initial_peers given; pass the addresses that a server or run_dht printed"
        )
    return config


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP."""
    config = parse(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the gateway needs {', '.join(missing)}: pip install 'planetserve[gateway]'"
        )
    cli.setup_logging(config.log_level)

    with cli.ended_by_interrupts():
        from planetserve.gateway.server import serve

    def on_ready(address: Address) -> None:
        names = ", ".join(address.models)
        cli.say(f"serving {names} at {address.url}/v1")
        if config.ready_file is not None:
            cli.write_ready_file(config.ready_file, url=address.url, models=address.models)

    cli.run_until_signalled(lambda stop: serve(config, stop, on_ready))


if __name__ == "__main__":
    cli.run(PROG, main)
