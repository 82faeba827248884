"""Plain values that every package shares: spans, hops, chains, what a server says of itself.

Frozen and slotted; of other packages only `typing_extensions`. Block spans are half-open,
`[start, end)`, everywhere.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from typing_extensions import override

from planetserve.errors import ConfigError

PeerId = str
"""A libp2p peer id in base58; for the Ed25519 keys used here it contains the public key."""

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_NAMES: tuple[DtypeName, ...] = get_args(DtypeName)
"""What weights and activations may be, as torch and settings name it. `wire/frame.py` numbers them,
`tensors.py` and `model/checkpoint.py` have torch's own."""

CLIENT = "client"
"""The name of the client's end of the ring wherever a peer id could stand."""


@dataclass(frozen=True, slots=True, order=True)
class BlockSpan:
    """Decoder blocks `[start, end)` of one model.

    Raises:
        ConfigError: the span is empty, negative or reversed.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.end <= self.start:
            raise ConfigError(
                f"block span {self.start}:{self.end} is empty or reversed; "
                "give START:END with 0 <= START < END, for example 0:8"
            )

    def __len__(self) -> int:
        return self.end - self.start

    @override
    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def covers(self, other: BlockSpan) -> bool:
        """Whether every block of `other` is in this span."""
        return self.start <= other.start and other.end <= self.end

    def overlap(self, other: BlockSpan) -> range:
        """The blocks that are in both spans; an empty range where there are none."""
        return range(max(self.start, other.start), min(self.end, other.end))

    @classmethod
    def parse(cls, text: str) -> BlockSpan:
        """Read `"a:b"`.

        Raises:
            ConfigError: the text is not two integers with one colon between them, or no span.
        """
        parts = text.strip().split(":")
        # Numbers of more digits would not be read by `int`, and no model has as many blocks.
        is_span = len(parts) == 2 and all(
            part.strip().isdecimal() and len(part) < 10 for part in parts
        )
        if not is_span:
            raise ConfigError(
                f"--block_indices {text[:40]!r} is not START:END; "
                "give two block numbers, for example --block_indices 0:8"
            )
        return cls(int(parts[0]), int(parts[1]))


class ServerState(enum.Enum):
    """What a server announces of its life."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What one server announces of itself; the body of its signed directory record."""

    peer_id: PeerId
    model: str
    """Directory prefix of the model: servers of one configuration meet under it."""
    fingerprint: str
    """Names the weights (revision) being served."""
    span: BlockSpan
    num_blocks: int
    """Blocks of the whole model."""
    state: ServerState
    dtype: str
    """Torch dtype name of weights and activations: float32, bfloat16 or float16."""
    addresses: tuple[str, ...]
    """Multiaddresses with the peer id, ready to dial."""
    decode_ms_per_block: float
    """Time one decode step of one sequence spends in one block, on the current load."""
    tokens_per_s_per_block: float
    """Tokens per second through one block when batched or prefilling."""
    network_bytes_per_s: float
    """What it can send, as large pushes have shown."""
    free_cache_tokens: int
    max_session_tokens: int
    """Longest sequence a session may hold here (`--inference_max_length`)."""
    alone_ms_per_block: float = 0.0
    """The same without load; 0 if not known."""
    quant_type: str = "none"
    version: str = "0"
    public_name: str = ""
    hop_overhead_ms: float = 0.0
    """What a decode step costs here whatever its blocks, without load."""
    next_rtt_ms: Mapping[PeerId, float] = field(default_factory=dict)
    """Measured round-trip times to servers that may come next in a chain."""
    announced_at_s: float = 0.0
    """Unix time of the announcement; the newest record of a peer wins."""
    protocol_versions: tuple[int, int] = (1, 1)
    """Oldest and newest version of the protocol that it speaks."""
    capabilities: tuple[str, ...] = ()
    """Optional parts of the protocol that it knows."""
    manifest: str = ""
    """Hash of the manifest of the weights (`model/manifest.py`); empty if it does not know it."""
    not_understood: tuple[str, ...] = ()
    """Fields of its record that a client must understand and that this node does not know."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One server's part of a chain: it runs blocks `[start, end)`."""

    peer_id: PeerId
    start: int
    end: int

    @property
    def span(self) -> BlockSpan:
        return BlockSpan(self.start, self.end)

    @override
    def __str__(self) -> str:
        return f"{self.start}:{self.end} via …{self.peer_id[-6:]}"


@dataclass(frozen=True, slots=True)
class Chain:
    """Hops that tile the blocks which the swarm runs, in order; `latency_ms` is predicted."""

    hops: tuple[Hop, ...]
    latency_ms: float = 0.0
    throughput_tokens_per_s: float = 0.0

    def __iter__(self) -> Iterator[Hop]:
        return iter(self.hops)

    def __len__(self) -> int:
        return len(self.hops)

    @override
    def __str__(self) -> str:
        return " => ".join(str(hop) for hop in self.hops)
