"""Settings of a server and of a client: one frozen dataclass each, and the only place of defaults.

A value comes from a keyword argument, a command-line flag or a YAML file; all three use the
field's name, and `from_mapping` turns any of them into a checked configuration. Names that people
know from Petals keep their spelling and their unit, which each field states: times are in seconds.

Nothing here touches the network, the disk (but for the YAML file named by the caller) or torch;
addresses, devices and names of strategies are checked by whoever uses them.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from planetserve.errors import ConfigError
from planetserve.types import BlockSpan

MAX_RECORD_LIFETIME_S = 600.0
"""Directory records may not outlive this; `expiration` is bounded by it."""

QUANT_TYPES = ("none", "int8", "nf4")
TORCH_DTYPES = ("auto", "float32", "bfloat16", "float16")
LOG_LEVELS = ("debug", "info", "warning", "error")

C = TypeVar("C")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client finds servers, waits for them and retries.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of peers to join the swarm through, each ending in /p2p/PEER_ID."""
    dht_prefix: str | None = None
    """Directory prefix of the model; by default it is derived from the model's name."""
    daemon_startup_timeout: float = 60.0
    """Seconds to wait for the local libp2p daemon."""
    show_route: bool | Literal["inference"] = "inference"
    """Log the chain of servers that a session uses, unless False."""
    allowed_servers: tuple[str, ...] | None = None
    """Use these peer ids only; None allows every server."""
    blocked_servers: tuple[str, ...] | None = None
    """Never use these peer ids."""
    trusted_servers: tuple[str, ...] | None = None
    """Only these peer ids run `trusted_blocks`; any server may run the others."""
    trusted_blocks: str | None = None
    """Blocks that only `trusted_servers` run, as START:END with commas between; a negative number
    counts from the end. By default the first two and the last two, 0:2,-2:"""
    local_blocks: str | None = None
    """Blocks that the client runs itself: the first ones, the last ones or both, such as 0:1 or
    0:2,-2: (START:END; a negative number counts from the end). Their weights and their KV cache
    stay in this machine's memory, as much for each block as a server needs."""
    use_server_to_server: bool = True
    """Servers push activations to the next server. Always on; False is refused."""
    connect_timeout: float = 5.0
    """Seconds to open a session on one server."""
    request_timeout: float = 180.0
    """Seconds a directory look-up or a whole-sequence forward pass may take."""
    step_timeout: float = 60.0
    """Seconds to wait for the answer to one inference step before its chain counts as failed."""
    stall_timeout: float = 5.0
    """Seconds during which nothing moves between two servers, although both answer pings, after
    which the session stops using the way between them."""
    probe_after: float = 1.0
    """Seconds without an answer after which the servers of a step are pinged; a silent one is
    replaced without waiting for `step_timeout`."""
    update_period: float = 60.0
    """Seconds between refreshes of the list of servers."""
    max_retries: int = 5
    """Failed attempts in a row after which an inference step raises its error; 0 never retries."""
    min_backoff: float = 1.0
    """Seconds to wait before the second retry; doubled for each further one."""
    max_backoff: float = 60.0
    """Longest wait between two retries, in seconds."""
    ban_timeout: float = 15.0
    """Seconds for which a server that failed is not chosen again."""
    max_pinged: int = 3
    """How many candidates for the first and for the last server are pinged in every
    `update_period` to measure the round-trip time."""
    ping_timeout: float = 2.0
    """Seconds after which a ping counts as lost."""
    chain_optimizer: str = "shortest_path"
    """Name of the strategy that picks the chain of servers, and its options after a colon, as in
    nsga2:objectives=4."""
    chain_spread: float = 0.1
    """A chain may be slower than the best one by up to this share, so that clients that plan at
    once choose different ones; 0 always takes the best."""
    chain_doubt: float = 0.5
    """How little to believe in the loads that servers announce, which will have changed before the
    session ends: this part of the expected wait at a server is one pass of it, however idle it
    looks. Less of it where even the busiest server is hardly busy, so that in an idle swarm the
    fastest chain is taken. 0 expects the loads of now."""
    replan_period: float = 10.0
    """Seconds between looks for a better chain while a session runs; 0 never looks."""
    replan_gain: float = 0.2
    """A session moves to another chain only if that saves this share of the time per token, and in
    all more than the move takes."""
    replan_checks: int = 3
    """How many looks in a row must have found such a chain."""
    wait_for_blocks_timeout: float = 10.0
    """Seconds to wait for servers that hold missing blocks before giving up."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "daemon_startup_timeout", "connect_timeout", "request_timeout", "step_timeout",
            "update_period", "ping_timeout", "probe_after", "stall_timeout",
            "replan_checks",
        )  # fmt: skip
        _require_not_negative(
            self, "max_retries", "min_backoff", "max_backoff", "ban_timeout", "max_pinged",
            "wait_for_blocks_timeout", "replan_period", "replan_gain",
        )  # fmt: skip
        for name in ("chain_spread", "chain_doubt"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value:g} is not between 0 and 1")
        if self.max_backoff < self.min_backoff:
            raise ConfigError(
                f"max_backoff={self.max_backoff:g} is below min_backoff={self.min_backoff:g}"
            )
        if not self.use_server_to_server:
            raise ConfigError(
                "use_server_to_server=False is not possible: servers always push to the next "
                "server; leave it out"
            )
        if self.trusted_blocks is not None and self.trusted_servers is None:
            raise ConfigError(
                "trusted_blocks says which blocks trusted_servers run; name the servers as well"
            )
        _check_prefix(self.dht_prefix)


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
    """Multiaddresses that other peers are told to dial, if not the ones it listens on."""
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
    page_size: int = 16
    """Tokens in one page of the KV cache; rounded up to what the attention backend needs."""
    attention_backend: str = "auto"
    """How attention is computed: auto, native (CPU), varlen (CUDA) or sdpa."""
    linear_backend: str = "auto"
    """How linear layers are stored and multiplied on a CPU: auto, packed or plain."""
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
    max_queued_mib: int = 512
    """MiB of activations of all peers that wait to be computed or sent on."""
    max_peer_queued_mib: int = 64
    """MiB of activations that wait for one client; past it, its servers upstream wait."""
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
        _require_positive(
            self, "daemon_startup_timeout", "max_batch_size", "page_size", "update_period",
            "request_timeout", "session_timeout", "step_timeout", "max_sessions",
            "max_peer_sessions", "max_peer_opens", "peer_open_burst", "max_queued_mib",
            "max_peer_queued_mib", "max_peer_kv_share", "prefill_slowdown",
        )  # fmt: skip
        if self.max_peer_kv_share > 1:
            raise ConfigError(
                f"max_peer_kv_share={self.max_peer_kv_share:g} is more than the whole cache; "
                "give a share in (0, 1]"
            )
        optional = (
            "num_blocks", "attn_cache_tokens", "inference_max_length", "num_threads",
            "network_mbps",
        )  # fmt: skip
        if self.kv_overcommit < 1:
            raise ConfigError(
                f"kv_overcommit={self.kv_overcommit:g} promises less than there is; give at least 1"
            )
        _require_positive(self, *(name for name in optional if getattr(self, name) is not None))
        if self.throughput != "auto":
            _require_positive(self, "throughput")
        if not self.update_period < self.expiration_s <= MAX_RECORD_LIFETIME_S:
            raise ConfigError(
                f"an announcement must stay valid longer than update_period="
                f"{self.update_period:g} and at most {MAX_RECORD_LIFETIME_S:g} seconds; "
                f"expiration is {self.expiration_s:g}"
            )
        _check_prefix(self.dht_prefix)

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


def from_mapping(cls: type[C], values: Mapping[str, object], source: str = "") -> C:
    """Build the configuration `cls` from field names and plain values, as YAML or flags give them.

    Args:
        cls: a configuration dataclass.
        values: field name -> value; numbers, strings, booleans and lists of strings.
        source: where the values come from, for error messages.

    Raises:
        ConfigError: an unknown name (the nearest known one is suggested), a value of the wrong
            type, a missing one, or whatever `cls` itself refuses.
    """
    checked = check_mapping(cls, values, source)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in checked:
            raise ConfigError(f"no {field.name} given{_WHERE.get(field.name, '')}")
    return cls(**checked)


def check_mapping(cls: type, values: Mapping[str, object], source: str = "") -> dict[str, Any]:
    """Check names and types of `values` against the fields of `cls`, and convert them.

    Raises:
        ConfigError: an unknown name or a value of the wrong type.
    """
    prefix = f"{source}: " if source else ""
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"{prefix}unknown setting {name!r}{did_you_mean(name, hints)}")
        try:
            checked[name] = _convert(value, hints[name])
        except _WrongType:
            raise ConfigError(f"{prefix}{name}={value!r} is not {_describe(hints[name])}") from None
    return checked


def load_yaml(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read a YAML file of settings. Dashes in keys count as underscores.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping of names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read {os.fspath(path)}: {reason}") from error
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{os.fspath(path)} is not valid YAML{place}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{os.fspath(path)} is not a YAML mapping of setting names to values")
    return {key.replace("-", "_"): value for key, value in loaded.items()}


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `choices`, or an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings under the fields of `cls`, read from its source: flag name -> help text."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for statement, following in zip(body, body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = inspect.cleandoc(following.value.value)
    return docs


class _Loader(yaml.SafeLoader):
    """YAML without base-60 integers, which would read the span 3:6 as the number 186."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:int"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), "-+0123456789"
)


_WHERE = {"model": "; put a folder, a repository name or demo before the flags"}


class _WrongType(Exception):
    """A value does not fit the annotation of its field."""


def _convert(value: object, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint))
    if origin is Literal:
        return _accept(value, value in typing.get_args(hint))
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        fits = isinstance(items, list | tuple | set | frozenset)
        return tuple(_convert(item, str) for item in _accept(items, fits))
    if hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_accept(value, fits and math.isfinite(value)))  # type: ignore[arg-type]
    if hint is int:
        return _accept(value, isinstance(value, int) and not isinstance(value, bool))
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is BlockSpan and isinstance(value, str):
        return BlockSpan.parse(value)
    return _accept(value, isinstance(value, hint))


def _convert_union(value: object, members: tuple[Any, ...]) -> Any:
    for member in members:
        try:
            return _convert(value, member)
        except _WrongType:
            continue
    raise _WrongType


def _accept(value: Any, fits: bool) -> Any:
    if not fits:
        raise _WrongType
    return value


def _describe(hint: Any) -> str:
    """An annotation in words, for error messages."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string",
             BlockSpan: "START:END"}  # fmt: skip
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = (member for member in typing.get_args(hint) if member is not type(None))
        return " or ".join(map(_describe, members))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if origin is tuple:
        return "a list of strings"
    return words.get(hint, str(hint))


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}={getattr(config, name)} must be greater than 0")


def _require_not_negative(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name}={getattr(config, name)} must not be negative")


def _check_prefix(prefix: str | None) -> None:
    if prefix is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", prefix):
        raise ConfigError(
            f"dht_prefix={prefix!r} may hold letters, digits, '-' and '_' only, at most 128"
        )
