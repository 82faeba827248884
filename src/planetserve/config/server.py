"""The settings of a server."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from planetserve.config.checks import LOG_LEVELS, TORCH_DTYPES, check_prefix, require_positive
from planetserve.errors import ConfigError
from planetserve.types import BlockSpan

MAX_RECORD_LIFETIME_S = 600.0
"""Directory records may not outlive this; `expiration` is bounded by it."""

MAX_CACHE_TOKENS = 100_000_000
"""Pages are listed before they are allocated, so that their number alone could use up a memory."""

QUANT_TYPES = ("none", "int8", "nf4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a server serves, where it listens and how much it takes on.

    Exactly one of `block_indices` and `num_blocks`, and one of `initial_peers` and `new_swarm`,
    must be given.

    Raises:
        ConfigError: a value is out of range or two exclude each other; the message names them.
    """

    model: str
    """Folder or Hugging Face repository of the model; "demo" is the small one in this package."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    token: str | None = dataclasses.field(default=None, repr=False)
    """Hugging Face access token; by default the one that `hf auth login` saved."""
    cache_dir: str | None = None
    """Folder for downloaded weights; by default Hugging Face's own cache."""
    block_indices: BlockSpan | None = None
    """Serve blocks START:END, END not included."""
    num_blocks: int | None = None
    """Serve this many blocks, the ones that the swarm needs most."""
    torch_dtype: str = "auto"
    """Data type of weights and activations; auto takes the checkpoint's own."""
    quant_type: str = "none"
    """Fewer bits per weight: int8 or nf4 (4 bits) hold more blocks in the same memory, at some cost
    in quality. Needs the extra `quant`. Clients take such servers only if there are no others."""
    device: str = "auto"
    """Torch device; auto takes cuda, then mps, then cpu."""

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of peers to join the swarm through, each ending in /p2p/PEER_ID."""
    new_swarm: bool = False
    """Start a swarm of its own instead of joining one."""
    dht_prefix: str | None = None
    """Directory prefix of the model; by default it is derived from the model's name."""
    host_maddrs: tuple[str, ...] = ()
    """Multiaddresses to listen on; by default the TCP port of --port on every interface."""
    announce_maddrs: tuple[str, ...] = ()
    """Multiaddresses that other peers are told to dial, if not the ones it listens on. Give IP
    addresses: servers with a public one dial no names that clients give them."""
    port: int = 0
    """TCP port to listen on, on every interface; 0 takes a free one."""
    public_ip: str | None = None
    """Announce this IP address with --port, for a forwarded port."""
    identity_path: str | None = None
    """File of the private key that makes the peer id; created if absent. By default a new key."""
    daemon_startup_timeout: float = 60.0
    """Seconds to wait for the local libp2p daemon."""
    public_name: str = ""
    """Name shown to users of the swarm."""

    attn_cache_tokens: int | None = None
    """Tokens of KV cache for all sessions; by default 16384, or 4096 without shared KV heads."""
    inference_max_length: int | None = None
    """Longest sequence of a session in tokens; by default 8192, or 2048 without shared KV heads."""
    max_batch_size: int = 512
    """Most tokens, of all sessions together, in one forward pass."""
    prefill_slowdown: float = 1.7
    """How much longer a forward pass may take for the sake of somebody's prompt than one for tokens
    that are being generated. Higher: prompts are done sooner; lower: texts flow more evenly."""
    batch_patience: float = 0.5
    """How long tokens that are being generated wait for those of other sessions, to share a forward
    pass: while that takes less than this many times what it saves; 0: never."""
    page_size: int = 16
    """Tokens in one page of the KV cache; rounded up to what the attention backend needs."""
    attention_backend: str = "auto"
    """How attention is computed: auto, native (CPU), varlen (CUDA) or sdpa."""
    linear_backend: str = "auto"
    """How linear layers are stored and multiplied on a CPU: auto, native, packed or plain."""
    num_threads: int | None = None
    """CPU threads for torch; by default torch's own choice."""
    throughput: float | Literal["auto"] = "auto"
    """Tokens per second through one block; auto measures it."""
    network_mbps: float | None = None
    """Mbit/s this server can send, announced instead of what it measures; by default 100 until
    large pushes have shown the rate."""

    max_sessions: int = 1024
    """Open sessions, of all peers together."""
    max_peer_sessions: int = 256
    """Open sessions of one peer."""
    max_peer_opens: float = 1200.0
    """Sessions that one peer may open per minute in the long run."""
    peer_open_burst: int = 200
    """Sessions that a peer which has been quiet may open at once."""
    max_peer_lookups: float = 1200.0
    """Keys of the directory that one peer may look up or store here per minute in the long run."""
    peer_lookup_burst: int = 600
    """Keys that a peer which has been quiet may look up or store at once."""
    max_queued_mib: int = 512
    """MiB of activations of all peers that are being received or wait to be computed or sent on."""
    max_peer_queued_mib: int = 64
    """MiB of such activations of one client's sessions; past it, its servers upstream wait."""
    max_peer_kv_share: float = 0.25
    """Share of the KV cache that one peer may hold while others hold some. A peer that is alone may
    hold it all, until others need their share: then its newest sessions have to move. 1 sets no
    limit, for swarms whose users are all known."""
    kv_overcommit: float = 2.0
    """How many times the KV cache is promised to sessions, most of which never use all that they
    ask for. When too many do, the newest lose memory, wait, and are computed again. 1 promises
    only what there is. Above it the inputs of open sessions are kept in memory, one hidden state
    for each promised token."""

    update_period: float = 60.0
    """Seconds between announcements to the directory."""
    expiration: float | None = None
    """Seconds an announcement stays valid; by default twice --update_period, at least 60."""
    request_timeout: float = 180.0
    """Seconds a directory look-up or a whole-sequence forward pass may take."""
    session_timeout: float = 1800.0
    """Longest life of a session, in seconds."""
    step_timeout: float = 300.0
    """Seconds without a step after which a session is closed."""

    ready_file: str | None = None
    """File to write, as JSON, once the server answers: peer id, addresses and process id."""
    log_level: str = "info"
    """How much to log."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("no model given; put a folder or a repository name first")
        self._check_choices()
        require_positive(
            self, "daemon_startup_timeout", "max_batch_size", "page_size", "update_period",
            "request_timeout", "session_timeout", "step_timeout", "max_sessions",
            "max_peer_sessions", "max_peer_opens", "peer_open_burst", "max_peer_lookups",
            "peer_lookup_burst", "max_queued_mib", "max_peer_queued_mib", "max_peer_kv_share",
            "prefill_slowdown",
        )  # fmt: skip
        if self.max_peer_kv_share > 1:
            raise ConfigError(
                f"max_peer_kv_share={self.max_peer_kv_share:g} is more than the whole cache; "
                "give a share in (0, 1]"
            )
        if not self.batch_patience >= 0:
            raise ConfigError(
                f"batch_patience={self.batch_patience:g} is negative; 0 turns waiting off"
            )
        optional = (
            "num_blocks", "attn_cache_tokens", "inference_max_length", "num_threads",
            "network_mbps",
        )  # fmt: skip
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

    def cache_tokens(self, *, shares_kv_heads: bool) -> int:
        """Size of the KV cache in tokens, for a model with or without grouped-query attention."""
        return self.attn_cache_tokens or (16384 if shares_kv_heads else 4096)

    def session_tokens(self, *, shares_kv_heads: bool) -> int:
        """Longest session in tokens: the setting or its default, and never more than the cache."""
        longest = self.inference_max_length or (8192 if shares_kv_heads else 2048)
        return min(longest, self.cache_tokens(shares_kv_heads=shares_kv_heads))
