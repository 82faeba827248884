"""The settings of a server."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from planetserve.config.checks import LOG_LEVELS, TORCH_DTYPES, check_prefix, require_positive
from planetserve.config.old_names import SERVER, accepts_old_names
from planetserve.errors import ConfigError
from planetserve.types import BlockSpan

MAX_RECORD_LIFETIME_S = 600.0
"""Directory records may not outlive this; `expiration` is bounded by it."""

MAX_CACHE_TOKENS = 100_000_000
"""Pages are listed before they are allocated, so that their number alone could use up a memory."""

QUANT_TYPES = ("auto", "none", "stored", "int8", "nf4")


@accepts_old_names(SERVER)
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a server serves, where it listens and how much it takes on.

    Exactly one of `block_indices` and `num_blocks`, and one of `initial_peers` and `new_swarm`,
    must be given.

    Raises:
        ConfigError: a value is out of range or two exclude each other; the message names them.
    """

    model: str
    """Folder or Hugging Face repository of the model; "demo" is the small model in this package."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    token: str | None = dataclasses.field(default=None, repr=False)
    """Hugging Face access token; by default the one that `hf auth login` saved."""
    cache_dir: str | None = None
    """Folder for downloaded weights; by default Hugging Face's own cache."""
    block_indices: BlockSpan | None = None
    """Blocks to serve, as START:END; END is not included."""
    num_blocks: int | None = None
    """Number of blocks to serve; the server picks those that the swarm needs most."""
    torch_dtype: str = "auto"
    """Data type of weights and activations; auto uses the checkpoint's."""
    quant_type: str = "auto"
    """How weights are held. none: in `torch_dtype`. stored: in the 4 or 8 bits of a checkpoint that
    is stored quantised. int8 or nf4 (4 bits): quantised here, so that more blocks fit in the same
    memory, at some cost in quality; needs the extra `quant`, and clients use such servers only if
    there are no others. auto: stored where the checkpoint and the device allow it, else none."""
    device: str = "auto"
    """Torch device; auto uses cuda, then mps, then cpu."""

    receipts: bool = False
    """Sign for what is taken in and sent on, for clients that ask for it. Nodes of the oldest
    versions do not find a server that does."""

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of peers to join the swarm through, each ending in /p2p/PEER_ID."""
    new_swarm: bool = False
    """Start a new swarm instead of joining one."""
    dht_prefix: str | None = None
    """Prefix of the model's keys in the directory; derived from the model's name by default."""
    host_maddrs: tuple[str, ...] = ()
    """Multiaddresses to listen on; by default TCP --port on every interface."""
    announce_maddrs: tuple[str, ...] = ()
    """Multiaddresses that other peers dial, if they differ from those listened on. Give IP
    addresses: servers with a public address do not dial host names that clients give them."""
    port: int = 0
    """TCP port to listen on, on every interface; 0 picks a free one."""
    public_ip: str | None = None
    """IP address to announce together with --port, for a forwarded port."""
    identity_path: str | None = None
    """File of the private key that determines the peer id; created if absent. By default every
    start makes a new key."""
    daemon_startup_timeout: float = 60.0
    """Seconds to wait until the local libp2p daemon has started."""
    public_name: str = ""
    """Name shown to users of the swarm."""

    attn_cache_tokens: int | None = None
    """Number of tokens in the KV cache, for all sessions together; by default 16384, or 4096 for
    models without shared KV heads, or 65536 for those with recurrent layers, whose states count as
    tokens that take as much memory."""
    inference_max_length: int | None = None
    """Maximum tokens in one sequence of a session; by default 8192, or 2048 for models without
    shared KV heads."""
    max_batch_size: int = 512
    """Maximum tokens in one forward pass, over all sessions."""
    prefill_slowdown: float = 1.7
    """Maximum factor by which tokens of prompts may lengthen a forward pass that also decodes.
    Higher values finish prompts sooner; lower values decode more evenly."""
    batch_delay_factor: float = 0.5
    """Maximum wait of decode steps for those of other sessions, so that they share a forward pass,
    as a multiple of the time that sharing saves; 0 never waits."""
    page_size: int = 16
    """Number of tokens in one page of the KV cache; rounded up to what the attention backend
    needs."""
    state_snapshots: int = 2
    """Number of earlier states that each sequence keeps in models with recurrent layers. Where a
    rollback (speculative decoding, a position set back) meets none, more tokens are recomputed."""
    attention_backend: str = "auto"
    """Backend that computes attention: auto, native (CPU), varlen (CUDA) or sdpa."""
    linear_backend: str = "auto"
    """Backend that stores and multiplies linear layers on a CPU: auto, native, packed or plain."""
    num_threads: int | None = None
    """Number of CPU threads for torch; by default torch's own choice."""
    throughput: float | Literal["auto"] = "auto"
    """Tokens per second through one block; auto measures it."""
    network_mbps: float | None = None
    """Upload rate in Mbit/s to announce instead of the measured one. Without it, 100 is announced
    until large transfers have shown the rate."""

    max_sessions: int = 1024
    """Maximum open sessions, over all peers."""
    max_peer_sessions: int = 256
    """Maximum open sessions of one peer."""
    max_peer_opens: float = 1200.0
    """Sessions that one peer may open per minute on average."""
    peer_open_burst: int = 200
    """Sessions that a peer may open at once after it has been idle."""
    max_peer_lookups: float = 1200.0
    """Directory keys that one peer may look up or store here per minute on average."""
    peer_lookup_burst: int = 600
    """Directory keys that a peer may look up or store at once after it has been idle."""
    max_queued_mib: int = 512
    """Maximum MiB of activations that are being received or wait to be computed or sent, over all
    peers."""
    max_peer_queued_mib: int = 64
    """Maximum MiB of such activations for the sessions of one client; beyond it, the servers
    upstream wait."""
    max_peer_kv_share: float = 0.25
    """Maximum share in (0, 1] of the KV cache that one peer may hold while other peers need some. A
    peer that is alone may hold all of it; when others come, its newest sessions have to move. 1
    sets no limit, for swarms whose users are all known."""
    kv_overcommit: float = 2.0
    """Factor by which the KV cache is promised to sessions beyond its size, since most sessions
    never use all that they reserve. When it runs out, the newest sessions lose pages, wait, and are
    recomputed. 1 promises only what there is. Above 1 the server keeps the inputs of open sessions
    in memory: one hidden state for each promised token."""

    metrics_port: int | None = None
    """TCP port on 127.0.0.1 at which Prometheus reads /metrics; by default there is none."""

    update_period: float = 60.0
    """Seconds between announcements to the directory."""
    expiration: float | None = None
    """Seconds for which an announcement stays valid; by default twice --update_period, at least
    60."""
    session_timeout: float = 1800.0
    """Maximum seconds that a session may stay open."""
    step_timeout: float = 300.0
    """Seconds without a step after which a session is closed."""

    ready_file: str | None = None
    """File to write, as JSON, once the server answers: peer id, addresses and process id."""
    log_level: str = "info"
    """Lowest level to log: debug, info, warning or error."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("no model given; put a folder or a repository name first")
        self._check_choices()
        require_positive(
            self, "daemon_startup_timeout", "max_batch_size", "page_size", "update_period",
            "session_timeout", "step_timeout", "max_sessions",
            "max_peer_sessions", "max_peer_opens", "peer_open_burst", "max_peer_lookups",
            "peer_lookup_burst", "max_queued_mib", "max_peer_queued_mib", "max_peer_kv_share",
            "prefill_slowdown", "state_snapshots",
        )  # fmt: skip
        if self.max_peer_kv_share > 1:
            raise ConfigError(
                f"max_peer_kv_share={self.max_peer_kv_share:g} is more than the whole cache; "
                "give a share in (0, 1]"
            )
        if not self.batch_delay_factor >= 0:
            raise ConfigError(
                f"batch_delay_factor={self.batch_delay_factor:g} is negative; 0 turns waiting off"
            )
        optional = (
            "num_blocks", "attn_cache_tokens", "inference_max_length", "num_threads",
            "network_mbps",
        )  # fmt: skip
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ConfigError(
                f"metrics_port={self.metrics_port} is no TCP port; give 1 to 65535, or 0 for any"
            )
        if self.kv_overcommit < 1:
            raise ConfigError(
                f"kv_overcommit={self.kv_overcommit:g} promises less than there is; give at least 1"
            )
        require_positive(self, *(name for name in optional if getattr(self, name) is not None))
        if (self.attn_cache_tokens or 0) > MAX_CACHE_TOKENS:
            raise ConfigError(
                f"attn_cache_tokens={self.attn_cache_tokens} is more than any machine holds; give "
                f"at most {MAX_CACHE_TOKENS}"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is no TCP port; give 1 to 65535, or 0 for any")
        if self.throughput != "auto":
            require_positive(self, "throughput")
        if not self.update_period < self.expiration_s <= MAX_RECORD_LIFETIME_S:
            raise ConfigError(
                f"an announcement must stay valid longer than update_period="
                f"{self.update_period:g} and at most {MAX_RECORD_LIFETIME_S:g} seconds; "
                f"expiration is {self.expiration_s:g}"
            )
        check_prefix(self.dht_prefix)

    def _check_choices(self) -> None:
        if (self.block_indices is None) == (self.num_blocks is None):
            raise ConfigError(
                "say which blocks to serve with one of --block_indices START:END and --num_blocks N"
            )
        if bool(self.initial_peers) == self.new_swarm:
            raise ConfigError(
                "give either --initial_peers ADDRESS... to join a swarm or --new_swarm to start one"
            )
        named = (
            ("torch_dtype", TORCH_DTYPES),
            ("quant_type", QUANT_TYPES),
            ("log_level", LOG_LEVELS),
        )
        for name, choices in named:
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of: "
                    + ", ".join(choices)
                )

    @property
    def expiration_s(self) -> float:
        """Seconds an announcement stays valid."""
        if self.expiration is not None:
            return self.expiration
        return min(max(2 * self.update_period, 60.0), MAX_RECORD_LIFETIME_S)

    def cache_tokens(self, *, shares_kv_heads: bool, has_states: bool = False) -> int:
        """Size of the KV cache in tokens, for a model with or without grouped-query attention, or
        with states of recurrent layers."""
        default = 65536 if has_states else 16384 if shares_kv_heads else 4096
        return self.attn_cache_tokens or default

    def session_tokens(self, *, shares_kv_heads: bool) -> int:
        """Longest session in tokens: the setting or its default, and never more than the cache."""
        longest = self.inference_max_length or (8192 if shares_kv_heads else 2048)
        return min(longest, self.cache_tokens(shares_kv_heads=shares_kv_heads))
