"""The settings of commands that write text with a swarm."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import override

from planetserve.config import LOG_LEVELS, TORCH_DTYPES, ClientConfig
from planetserve.errors import ConfigError

GROUPS = {
    "model": ("model", "torch_dtype", "device", "revision", "token", "cache_dir"),
    "text": ("max_new_tokens", "temperature", "top_p", "top_k", "seed"),
    "swarm": ("initial_peers", "dht_prefix", "allowed_servers", "blocked_servers",
              "trusted_servers", "trusted_blocks", "local_blocks", "chain_optimizer"),
    "timing": ("daemon_startup_timeout", "connect_timeout", "step_timeout", "max_retries",
               "wait_for_blocks_timeout"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig(ClientConfig):
    """Which model writes, and how its tokens are chosen.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    model: str
    """Folder or Hugging Face repository of the model; demo is the small one in this package."""
    torch_dtype: str = "auto"
    """Data type of the embedding, the head and the activations; auto takes the checkpoint's own."""
    device: str = "cpu"
    """Where embedding and head run, such as cpu or cuda:0."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    token: str | None = field(default=None, repr=False)
    """Hugging Face access token; by default the one that `hf auth login` saved."""
    cache_dir: str | None = None
    """Folder for downloads; by default Hugging Face's own cache."""

    max_new_tokens: int | None = None
    """Most tokens of an answer; by default 512, or fewer where the servers have less room."""
    temperature: float | None = None
    """How much chance decides: 0 always takes the most likely token. By default as the model's
    generation_config.json says, also for the next two."""
    top_p: float | None = None
    """Choose among the most likely tokens whose probabilities add up to this."""
    top_k: int | None = None
    """Choose among so many most likely tokens."""
    seed: int | None = None
    """Seed of chance; by default another one every time."""

    log_level: str = "error"
    """What is logged to stderr: debug, info, warning or error. Prompts are never logged."""

    @override
    def __post_init__(self) -> None:
        ClientConfig.__post_init__(self)
        if not self.initial_peers:
            raise ConfigError(
                "no --initial_peers given; pass the addresses that a server or `planetserve dht` "
                "printed"
            )
        for name, choices in (("torch_dtype", TORCH_DTYPES), ("log_level", LOG_LEVELS)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not one of: {', '.join(choices)}"
                )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature={self.temperature:g} is not between 0 and 100")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p:g} must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2^63")
