"""The settings of a gateway: those of the client that it is, and of the API that it offers."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import override

from planetserve.config.checks import (
    LOG_LEVELS,
    TORCH_DTYPES,
    require_not_negative,
    require_positive,
)
from planetserve.config.client import ClientConfig
from planetserve.errors import ConfigError

_OF_ONE_MODEL = ("revision", "chat_template", "response_template", "dht_prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(ClientConfig):
    """Which model a gateway offers, to whom, and how much at once.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    model: str
    """Folder or Hugging Face repository of the model; demo is the small one in this package."""
    dtype: str = "auto"
    """Data type of the embedding, the head and the activations: auto, float32, bfloat16 or
    float16; auto takes the checkpoint's own."""
    device: str = "cpu"
    """Where embedding and head run, such as cpu or cuda:0."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    token: str | None = field(default=None, repr=False)
    """Hugging Face access token; by default the one that `hf auth login` saved."""
    cache_dir: str | None = None
    """Folder for downloads; by default Hugging Face's own cache."""

    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs --api_key."""
    port: int = 8000
    """TCP port to listen on; 0 takes a free one."""
    api_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys of which a request to /v1 must bring one, as `Authorization: Bearer KEY`."""
    api_key_file: str | None = None
    """YAML file of more keys, with names and limits: docs/gateway.md."""
    served_model_name: tuple[str, ...] = ()
    """Names that requests may call the model; by default the one it was given by."""
    served_model: tuple[str, ...] = ()
    """More models to serve, each a folder or repository that requests call by that name, or
    NAME=MODEL."""
    chat_template: str | None = None
    """File of the Jinja template to use for chats, instead of the tokenizer's."""
    response_template: str | None = None
    """JSON file that says how the model writes reasoning and calls of tools, in the format of
    transformers' response templates; by default the tokenizer's, or that of its family."""
    generation_config: Literal["auto", "vllm"] = "auto"
    """Where a request's missing sampling parameters come from: auto takes those of the model's
    generation_config.json, vllm takes none from there."""

    max_model_len: int | None = None
    """Tokens of prompt and answer together; by default what the model's configuration says."""
    max_num_seqs: int = 64
    """Texts that are generated at once; also the most one request may ask for."""
    max_num_queued_reqs: int = 256
    """Prompts that wait for others to end; beyond that requests are refused with status 429."""
    max_warm_sessions: int = 16
    """Sessions that are kept on their servers after their texts have ended, for the next turn of a
    chat; 0 keeps none."""
    warm_session_timeout: float = 120.0
    """Seconds for which such a session is kept."""
    max_logprobs: int = 20
    """Most likely tokens that a request may ask to see for each position."""
    max_body_mib: float = 8.0
    """Largest request body."""
    shutdown_timeout: float = 5.0
    """Seconds that running answers are given to end after SIGINT or SIGTERM."""
    ready_file: str | None = None
    """Write the URL and the model's names to this JSON file once the gateway answers."""
    log_level: str = "info"
    """What is logged to stderr: debug, info, warning or error. Prompts are never logged."""

    @override
    def __post_init__(self) -> None:
        # `super()` without arguments does not work in a dataclass with slots.
        ClientConfig.__post_init__(self)
        require_positive(self, "max_num_seqs", "max_body_mib", "warm_session_timeout")
        require_not_negative(
            self, "max_num_queued_reqs", "max_logprobs", "max_warm_sessions", "shutdown_timeout"
        )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len={self.max_model_len} must be at least 2")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is no TCP port; give 1 to 65535, or 0 for any")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f"log_level={self.log_level!r} is not one of: {', '.join(LOG_LEVELS)}"
            )
        if self.dtype not in TORCH_DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not one of: {', '.join(TORCH_DTYPES)}")
        if self.local_blocks is not None:
            raise ConfigError("local_blocks is not possible in a gateway; start a server instead")
        for name in _OF_ONE_MODEL if self.served_model else ():
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} is of one model, and --served_model gives more")
        if not all(key.isascii() and key.strip() == key and key for key in self.api_key):
            raise ConfigError("api_key must be printable ASCII without spaces around it")
        if not (self.api_key or self.api_key_file) and not is_loopback(self.host):
            raise ConfigError(
                f"host={self.host} lets other machines in; give --api_key KEY or --api_key_file "
                "FILE as well, or leave --host out to answer this machine only"
            )

    def all_models(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each model and the names that requests may call it."""
        found = [(self.model, self.served_model_name or (self.model,))]
        for given in self.served_model:
            name, has_name, model = given.partition("=")
            found.append((model, (name,)) if has_name else (given, (given,)))
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
