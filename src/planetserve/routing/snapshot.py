"""A planner's view of a swarm at one moment: spans, speeds, free cache, trust, prices, RTTs.

A snapshot is immutable and complete: the same snapshot and request give the same chain, so a client
can save the one it planned on, and the plan can be repeated. Values are checked when a snapshot is
built, whether it comes from the directory or from a file; the file format is strict JSON, in the
shape that `from_json` checks.

Round-trip times are symmetric; `"client"` names the client's end of the ring. They are given as a
table by names, in which pairs may be missing, or as a matrix, and are read as `round_trips` in
either form. Nothing here measures or fetches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np

from planetserve.errors import ConfigError
from planetserve.routing.arrays import BoolArray
from planetserve.routing.round_trips import RoundTrips, RttMatrix, RttTable
from planetserve.types import CLIENT, BlockSpan

SNAPSHOT_VERSION = 1
MAX_SNAPSHOT_BYTES = 64 * 2**20
"""Longest snapshot file that is read: room for the full RTT table of about 1,000 servers."""
MAX_BLOCKS = 4096
MAX_ID_CHARS = 128
_MAX_NUMBER = 1e15
_MIN_RATE = 1e-9
_LEAST_NUMBERS = {
    "tokens_per_s_per_block": _MIN_RATE,
    "network_bytes_per_s": _MIN_RATE,
    "decode_ms_per_block": 0.0,
    "free_cache_tokens": 0.0,
    "reputation": 0.0,
    "price": 0.0,
    "wait_ms": 0.0,
}
"""The least value of each number of a server."""


@dataclass(frozen=True, slots=True)
class ServerPoint:
    """One server as the planner sees it: it holds blocks `[start, end)`.

    Raises:
        ConfigError: a number is negative, not finite or absurd, the span is empty, or the id cannot
            be printed.
    """

    id: str
    start: int
    end: int
    decode_ms_per_block: float
    """Time of one decode step of one sequence in one block, under the server's current load,
    without `wait_ms`."""
    tokens_per_s_per_block: float
    """Tokens per second through one block when batched."""
    network_bytes_per_s: float
    free_cache_tokens: int
    reputation: float = 1.0
    price: float = 0.0
    """Price of one token through one block, in whatever unit the swarm uses."""
    wait_ms: float = 0.0
    """Time that a decode step waits for others at every visit, however many blocks it uses."""

    def __post_init__(self) -> None:
        if not self.id or len(self.id) > MAX_ID_CHARS or not self.id.isprintable():
            raise ConfigError(
                f"server id {_show(self.id)} must be 1 to {MAX_ID_CHARS} printable characters"
            )
        if self.id == CLIENT:
            raise ConfigError(f"a server cannot be called {CLIENT!r}: that names the client")
        if self.start < 0:
            raise ConfigError(
                f"server {self.id!r}: span {self.start}:{self.end} leaves the model, "
                "whose first block is 0"
            )
        if self.start >= self.end:
            raise ConfigError(
                f"server {self.id!r}: span {self.start}:{self.end} is empty or reversed"
            )
        for name, least in _LEAST_NUMBERS.items():
            value = getattr(self, name)
            if not least <= value <= _MAX_NUMBER:  # no error text is made for a good number
                _check_number(value, f"server {self.id!r}: {name}", least)

    @property
    def span(self) -> BlockSpan:
        return BlockSpan(self.start, self.end)


@final
@dataclass(frozen=True)
class SwarmSnapshot:
    """A swarm at one moment. No slots: what is derived from the RTT table is computed once, on
    first use.

    Raises:
        ConfigError: a value is out of range, an id is used twice, a span leaves the model, the RTT
            table names an unknown server or contradicts itself, or an RTT matrix is of others.
    """

    num_blocks: int
    activation_bytes_per_token: float
    hop_overhead_ms: float
    default_rtt_ms: float
    """Round-trip time of pairs that `rtt_ms` does not hold; a matrix holds all."""
    servers: tuple[ServerPoint, ...]
    rtt_ms: Mapping[str, Mapping[str, float]] | RttMatrix = field(default_factory=dict)
    """By names; or a matrix in the order of `servers`, the client last, which is cheaper than a
    table of all pairs that is made and checked for every plan."""
    version: int = SNAPSHOT_VERSION

    def __post_init__(self) -> None:
        if self.version != SNAPSHOT_VERSION:
            raise ConfigError(
                f"snapshot version {_show(self.version)} is not {SNAPSHOT_VERSION}, "
                "the only one this release reads"
            )
        if not 1 <= self.num_blocks <= MAX_BLOCKS:
            raise ConfigError(f"num_blocks must be 1 to {MAX_BLOCKS}, not {_show(self.num_blocks)}")
        for name in ("activation_bytes_per_token", "hop_overhead_ms", "default_rtt_ms"):
            _check_number(getattr(self, name), name)
        seen: set[str] = set()
        for server in self.servers:
            if server.id in seen:
                raise ConfigError(f"two servers have the id {server.id!r}")
            if server.end > self.num_blocks:
                raise ConfigError(
                    f"server {server.id!r}: span {server.start}:{server.end} leaves the model, "
                    f"which has {self.num_blocks} blocks"
                )
            seen.add(server.id)
        if isinstance(self.rtt_ms, RttMatrix):
            if len(self.rtt_ms) != len(self.servers) + 1:
                raise ConfigError(
                    f"a matrix of {len(self.rtt_ms)} ends is not of {len(self.servers)} servers "
                    "and their client"
                )
        else:
            _check_rtts(self.rtt_ms, seen | {CLIENT})

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each server in `servers`; the client comes last."""
        ids = [server.id for server in self.servers] + [CLIENT]
        return {server_id: position for position, server_id in enumerate(ids)}

    @cached_property
    def round_trips(self) -> RoundTrips:
        """Every round-trip time, by positions in `index`."""
        if isinstance(self.rtt_ms, RttMatrix):
            return self.rtt_ms
        return RttTable(self.index, self.rtt_ms, self.default_rtt_ms)

    def rtt(self, first: str, second: str) -> float:
        """Round-trip time between two of the servers or the client, in milliseconds.

        Raises:
            ConfigError: one of them is neither.
        """
        return self.round_trips.between(self._position(first), self._position(second))

    def server(self, server_id: str) -> ServerPoint:
        """The server of that id.

        Raises:
            ConfigError: there is none.
        """
        if server_id == CLIENT:
            raise ConfigError(f"{CLIENT!r} is no server of the snapshot")
        return self.servers[self._position(server_id)]

    def _position(self, name: str) -> int:
        position = self.index.get(name)
        if position is None:
            raise ConfigError(f"{_show(name)} is no server of the snapshot")
        return position

    def missing_blocks(self) -> tuple[tuple[int, int], ...]:
        """Half-open spans of blocks that no server holds."""
        covered = np.zeros(self.num_blocks, dtype=bool)
        for server in self.servers:
            covered[server.start : server.end] = True
        return uncovered_spans(covered)

    def to_json(self) -> str:
        """The snapshot as a file that `from_json` reads back to an equal one."""
        document: dict[str, Any] = {
            "version": self.version,
            "num_blocks": self.num_blocks,
            "activation_bytes_per_token": self.activation_bytes_per_token,
            "hop_overhead_ms": self.hop_overhead_ms,
            "default_rtt_ms": self.default_rtt_ms,
            "servers": [
                {name: getattr(server, name) for name in _SERVER_KEYS} for server in self.servers
            ],
            "rtt_ms": self._rtt_rows(),
        }
        return json.dumps(document, allow_nan=False)

    def _rtt_rows(self) -> dict[str, dict[str, float]]:
        """The times as a table by names."""
        if not isinstance(self.rtt_ms, RttMatrix):
            return {first: dict(row) for first, row in self.rtt_ms.items()}
        names = list(self.index)
        rows = (2.0 * self.rtt_ms.half_ms).tolist()
        return {
            name: dict(zip(names[:place], rows[place], strict=False))
            for place, name in enumerate(names)
            if place
        }

    @classmethod
    def from_json(cls, text: str) -> SwarmSnapshot:
        """Read a snapshot.

        Raises:
            ConfigError: the text is too long, no JSON, or not exactly a snapshot.
        """
        if len(text) > MAX_SNAPSHOT_BYTES:
            raise ConfigError(_too_long("snapshot"))
        try:
            document = json.loads(
                text, object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse_constant
            )
        except ConfigError:
            raise
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"snapshot is not valid JSON: {error}") from error
        return _decode_snapshot(document)

    @classmethod
    def load(cls, path: str | Path) -> SwarmSnapshot:
        """Read a snapshot file, never more than `MAX_SNAPSHOT_BYTES` of it.

        Raises:
            ConfigError: the file cannot be read, is too long, or holds no snapshot.
        """
        try:
            with Path(path).open("rb") as file:
                raw = file.read(MAX_SNAPSHOT_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"cannot read snapshot {str(path)!r}: {error.strerror}") from error
        if len(raw) > MAX_SNAPSHOT_BYTES:
            raise ConfigError(_too_long(f"snapshot {str(path)!r}"))
        try:
            return cls.from_json(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"snapshot {str(path)!r} is not UTF-8 text") from error

    def save(self, path: str | Path) -> None:
        """Write the snapshot as a file for `load`.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            Path(path).write_text(self.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write snapshot {str(path)!r}: {error.strerror}") from error


def _check_rtts(table: Mapping[str, Mapping[str, float]], known: set[str]) -> None:
    for first, row in table.items():
        if first not in known:
            raise ConfigError(f"rtt_ms names {_show(first)}, which is no server of the snapshot")
        for second, value in row.items():
            if second not in known:
                raise ConfigError(
                    f"rtt_ms of {first!r} names {_show(second)}, which is no server of the snapshot"
                )
            _check_number(value, f"rtt_ms of {first!r} and {second!r}")
            if first == second and value != 0:
                raise ConfigError(f"rtt_ms of {first!r} to itself must be 0 or left out")
            other = table.get(second, {}).get(first, value)
            if other != value:
                raise ConfigError(
                    f"rtt_ms of {first!r} and {second!r} is given twice with unequal values"
                )


def uncovered_spans(covered: BoolArray) -> tuple[tuple[int, int], ...]:
    """The maximal runs of False in `covered`, as half-open spans."""
    edges = np.flatnonzero(np.diff(np.concatenate(([True], covered, [True])).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


_SERVER_KEYS = tuple(spec.name for spec in fields(ServerPoint))
_SERVER_INTEGERS = frozenset({"start", "end", "free_cache_tokens"})
_SERVER_OPTIONAL = frozenset({"reputation", "price", "wait_ms"})
_SNAPSHOT_KEYS = tuple(spec.name for spec in fields(SwarmSnapshot))


def _decode_snapshot(document: object) -> SwarmSnapshot:
    items = _object(document, "snapshot", _SNAPSHOT_KEYS, optional={"rtt_ms"})
    for name in ("version", "num_blocks"):
        _integer(items[name], name)
    for name in ("activation_bytes_per_token", "hop_overhead_ms", "default_rtt_ms"):
        items[name] = _number(items[name], name)
    servers = items["servers"]
    if not isinstance(servers, list):
        raise ConfigError("servers must be a list")
    items["servers"] = tuple(_decode_server(entry, i) for i, entry in enumerate(servers))
    table = items.get("rtt_ms", {})
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise ConfigError("rtt_ms must map ids to objects that map ids to numbers")
    items["rtt_ms"] = {
        first: {
            second: _number(value, f"rtt_ms of {_show(first)}") for second, value in row.items()
        }
        for first, row in table.items()
    }
    return SwarmSnapshot(**items)


def _decode_server(entry: object, position: int) -> ServerPoint:
    where = f"servers[{position}]"
    items = _object(entry, where, _SERVER_KEYS, optional=_SERVER_OPTIONAL)
    if not isinstance(items["id"], str):
        raise ConfigError(f"{where}: id must be a string")
    for name, value in items.items():
        if name in _SERVER_INTEGERS:
            _integer(value, f"{where}: {name}")
        elif name != "id":
            items[name] = _number(value, f"{where}: {name}")
    return ServerPoint(**items)


def _object(
    value: object, where: str, keys: Sequence[str], optional: Iterable[str]
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object")
    unknown = sorted(set(value) - set(keys))
    if unknown:
        raise ConfigError(f"{where}: unknown key {_show(unknown[0])}; keys are {', '.join(keys)}")
    missing = [key for key in keys if key not in value and key not in set(optional)]
    if missing:
        raise ConfigError(f"{where}: key {missing[0]!r} is missing")
    return dict(value)


def _integer(value: object, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{where} must be an integer, not {_show(value)}")


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{where} must be a number, not {_show(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_number(value: float, where: str, least: float = 0.0) -> None:
    if not least <= value <= _MAX_NUMBER:  # also refuses NaN, which compares false
        raise ConfigError(
            f"{where} must be a finite number from {least:g} to {_MAX_NUMBER:g}, not {_show(value)}"
        )


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ConfigError(f"snapshot repeats the key {_show(key)}")
            seen.add(key)
    return items


def _refuse_constant(name: str) -> float:
    raise ConfigError(f"snapshot holds {name}; every number must be finite")


def _too_long(what: str) -> str:
    return f"{what} is longer than {MAX_SNAPSHOT_BYTES // 2**20} MiB"


def _show(value: object) -> str:
    """`value` on one line, short enough for an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
