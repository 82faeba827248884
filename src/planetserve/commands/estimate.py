"""`planetserve estimate MODEL`: what it takes to run a model here, and how fast it would be.

Sizes come from the model's configuration, memory from the system, times from blocks that run here
with made-up weights: no weights are downloaded.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from planetserve import cli
from planetserve.commands import options
from planetserve.commands.options import SwarmOptions
from planetserve.config import TORCH_DTYPES, ClientConfig
from planetserve.errors import ConfigError, PlanetServeError

if TYPE_CHECKING:
    from rich.console import Console

    from planetserve.commands.memory import FreeMemory, ModelMemory
    from planetserve.commands.speed import LocalSpeed
    from planetserve.model.checkpoint import Checkpoint
    from planetserve.types import Chain

PROG = "planetserve estimate"

USAGE = "MODEL [--initial_peers ADDRESS...] [--torch_dtype TYPE] [--json] [more flags]"

DESCRIPTION = """\
Show how much memory a model's blocks take, how many of them fit on this machine, and how many
tokens per second one user would get: alone here, in a swarm of machines like this one, and, with
--initial_peers, in that swarm now. No weights are read: sizes follow from the model's
configuration, and times are of blocks with made-up weights that run here.
"""

EXAMPLES = """examples:
  planetserve estimate demo
  planetserve estimate MODEL --torch_dtype bfloat16 --device cuda
  planetserve estimate MODEL --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...
"""

GROUPS = {
    "model": ("model", "torch_dtype", "device", *options.FILES),
    "swarm": ("initial_peers", "dht_prefix", "daemon_startup_timeout", "connect_timeout",
              "ping_timeout"),
    "output": ("no_timing", "json", "log_level"),
}  # fmt: skip

JSON_VERSION = 1
_RTTS_MS = {2.0: "one building", 30.0: "one country", 120.0: "across an ocean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateConfig(SwarmOptions):
    """Which model, on which device.

    Raises:
        ConfigError: a value is out of range, or there is no model.
    """

    torch_dtype: str = "auto"
    """Data type to time; auto takes the checkpoint's own."""
    device: str = "auto"
    """Where a server would compute: auto, cpu, cuda, cuda:1, mps."""
    no_timing: bool = False
    """Leave out what has to run here, and say nothing of speed."""

    @override
    def __post_init__(self) -> None:
        SwarmOptions.__post_init__(self)
        if self.model is None:
            raise ConfigError("say which MODEL: a folder, a repository or demo")
        if self.torch_dtype not in TORCH_DTYPES:
            raise ConfigError(
                f"torch_dtype={self.torch_dtype!r} is not one of: {', '.join(TORCH_DTYPES)}"
            )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What was found out.

    Attributes:
        speed: None if nothing was timed; `no_speed` says why.
        chain: of the swarm; None if there is none, or none was asked for; `no_chain` says why.
    """

    checkpoint: Checkpoint
    dtype: str
    activation_bytes: int
    device: str
    memory: ModelMemory
    free: FreeMemory
    speed: LocalSpeed | None
    no_speed: str
    chain: Chain | None
    no_chain: str

    @property
    def num_blocks(self) -> int:
        return self.checkpoint.num_blocks

    @property
    def base_bytes(self) -> int:
        """What a server's process takes besides weights and KV cache."""
        return self.speed.base_bytes if self.speed is not None else 0

    def num_fitting(self, dtype: str, quant_type: str = "none") -> int:
        """Blocks of this kind that a server here could take."""
        room = self.free.num_bytes - self.base_bytes
        return self.memory.kind(dtype, quant_type).num_fitting(room)

    @property
    def alone(self) -> float | None:
        """Tokens per second with all blocks here; None if not timed, or they do not fit."""
        if self.speed is None or self.num_fitting(self.dtype) < self.num_blocks:
            return None
        return self.speed.alone_tokens_per_s(self.num_blocks)

    @property
    def num_servers(self) -> int:
        """Servers like this machine that a swarm would need, two at least; 0 if nothing fits."""
        fitting = self.num_fitting(self.dtype)
        return max(2, math.ceil(self.num_blocks / fitting)) if fitting else 0

    def swarms(self) -> dict[float, float]:
        """Round-trip time in ms -> tokens per second of a swarm of machines like this one."""
        if self.speed is None or not self.num_servers:
            return {}
        return {
            rtt_ms: self.speed.swarm_tokens_per_s(
                self.num_blocks, self.num_servers, rtt_ms, self.activation_bytes
            )
            for rtt_ms in _RTTS_MS
        }

    @property
    def live(self) -> float | None:
        """Tokens per second of the swarm that was asked for."""
        if self.chain is None:
            return None
        return 1000 / (self.chain.latency_ms + (self.speed.head_ms if self.speed else 0.0))

    def verdict(self) -> str:
        """Where the model runs faster, and what to do."""
        if self.num_fitting(self.dtype) < self.num_blocks:
            smaller = [
                kind.quant_type
                for kind in self.memory.kinds
                if kind.dtype == self.dtype and kind.quant_type != "none"
                and self.num_fitting(self.dtype, kind.quant_type) == self.num_blocks
            ]  # fmt: skip
            also = f"; all of it fits with --quant_type {smaller[0]}" if smaller else ""
            return f"as {self.dtype} the model does not fit here, so it needs a swarm{also}"
        if self.alone is None:
            return f"the whole model fits here as {self.dtype}"
        if self.live is None:
            return (
                "running it here is faster than a swarm of machines like this one, whose links "
                "add time; a swarm gains where its servers are faster or this one is needed for "
                "other things"
            )
        if self.live > self.alone:
            return f"the swarm is faster: {self.live:.1f} against {self.alone:.1f} tokens/s here"
        return f"running it here is faster: {self.alone:.1f} against {self.live:.1f} tokens/s"

    def assumptions(self) -> list[str]:
        """What the numbers take for granted."""
        found = [
            f"a server keeps {self.memory.cache_tokens} tokens of KV cache, its default",
            "int8 and nf4 hold the linear layers and experts; the rest stays as the dtype says",
        ]
        if self.memory.state_bytes:
            found.append(
                f"states of recurrent layers take {self.memory.state_bytes / 2**20:.1f} MiB more "
                "for each text as bfloat16, in all blocks together"
            )
        if self.speed is not None:
            found += [
                f"all blocks take as long as {self.speed.span}, which ran here with made-up "
                f"weights as {self.dtype}",
                "in a swarm of machines like this one all are equally far from each other, idle, "
                "and send 100 Mbit/s",
            ]
        else:
            found.append("the server's process itself takes no memory")
        return found


def parse(argv: Sequence[str] | None = None) -> EstimateConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(PROG, USAGE, DESCRIPTION, EXAMPLES)
    cli.add_fields(parser, EstimateConfig, GROUPS, positional=("model",))
    return cli.parse_config(parser, EstimateConfig, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Estimate and show.

    Raises:
        ConfigError: the command line is wrong, or the model cannot be found or served.
    """
    config = parse(argv)
    cli.setup_logging(config.log_level)

    from rich.console import Console

    with Console(stderr=True).status("measuring"):
        found = _estimate(config)
    if config.json:
        sys.stdout.write(json.dumps(_as_json(found), indent=2) + "\n")
    else:
        _print(found, Console(highlight=False))


def _estimate(config: EstimateConfig) -> Estimate:
    with cli.ended_by_interrupts():
        from planetserve.commands import memory as memory_module
        from planetserve.commands import speed as speed_module
        from planetserve.commands.swarm_reading import open_checkpoint
        from planetserve.model.checkpoint import parse_dtype
        from planetserve.server.factory import device_named

    device = device_named(config.device)
    checkpoint = open_checkpoint(config)
    dtype = parse_dtype(config.torch_dtype, checkpoint, device)
    name = speed_module.named(dtype)
    memory = memory_module.model_memory(checkpoint)
    free = memory_module.free_memory(device)
    speed, no_speed = None, "--no_timing was given"
    if not config.no_timing:
        try:
            speed = speed_module.measure(checkpoint, dtype, device, memory.kind(name))
        except (PlanetServeError, MemoryError, RuntimeError) as error:
            no_speed = f"its blocks do not run here: {error}"
    chain, no_chain = None, ""
    if config.initial_peers:
        names = ("initial_peers", "dht_prefix", "daemon_startup_timeout", "connect_timeout",
                 "ping_timeout")  # fmt: skip
        client = ClientConfig(
            **{name: getattr(config, name) for name in names}, wait_for_blocks_timeout=0
        )
        try:
            chain = speed_module.live_chain(client, checkpoint, dtype)
        except PlanetServeError as error:
            no_chain = str(error)
    return Estimate(
        checkpoint, name, speed_module.activation_bytes(checkpoint, dtype), str(device), memory,
        free, speed, no_speed, chain, no_chain,
    )  # fmt: skip


def _print(found: Estimate, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from planetserve.commands.memory import mib, spread

    name, total = found.checkpoint.name, found.num_blocks
    console.print(Text(f"{name}: {total} blocks", style="bold"))
    used = f", of which a server's process takes {mib(found.base_bytes)}" if found.speed else ""
    console.print(f"{mib(found.free.num_bytes)} free ({found.free.source}){used}\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("weights", no_wrap=True)
    for title in ("per block", "KV cache", "all blocks", "fit here"):
        table.add_column(title, justify="right")
    for kind in found.memory.kinds:
        fitting = found.num_fitting(kind.dtype, kind.quant_type)
        is_plain = kind.quant_type == "none"
        table.add_row(
            kind.dtype if is_plain else f"  {kind.quant_type}, rest {kind.dtype}",
            spread(kind.weights), spread(kind.cache), mib(sum(kind.per_block)),
            f"all {total}" if fitting == total else f"{fitting} of {total}",
            style="bold" if is_plain and kind.dtype == found.dtype else "",
        )  # fmt: skip
    console.print(table)
    console.print()
    for line in _speed_lines(found):
        console.print(Text(line))
    console.print(Text(found.verdict(), style="bold green"))
    console.print("\nassumed:", style="dim")
    for line in found.assumptions():
        console.print(Text(f"  {line}", style="dim"))


def _speed_lines(found: Estimate) -> list[str]:
    speed = found.speed
    if speed is None:
        return [f"nothing was timed: {found.no_speed}"]
    lines = [
        f"measured on {found.device} as {found.dtype}: {speed.ms_per_block:.2f} ms per block and "
        f"token, {speed.overhead_ms:.2f} ms per server, {speed.head_ms:.2f} ms for the head; "
        f"{speed.tokens_per_s_per_block:.0f} tokens/s through a block in large batches",
        "one user would get:",
    ]
    if found.alone is not None:
        lines.append(f"  {found.alone:8.1f} tokens/s with all blocks on this machine")
    for rtt_ms, rate in found.swarms().items():
        lines.append(
            f"  {rate:8.1f} tokens/s from {found.num_servers} machines like this one, "
            f"{rtt_ms:g} ms apart ({_RTTS_MS[rtt_ms]})"
        )
    if found.live is not None and found.chain is not None:
        hops = f"{len(found.chain)} server{'' if len(found.chain) == 1 else 's'}"
        lines.append(f"  {found.live:8.1f} tokens/s in this swarm now, from {hops}")
    elif found.no_chain:
        lines.append(f"  nothing in this swarm: {found.no_chain}")
    return lines


def _as_json(found: Estimate) -> dict[str, Any]:
    speed: dict[str, Any] | None = None
    if found.speed is not None:
        speed = {
            "blocks": str(found.speed.span),
            "ms_per_block": found.speed.ms_per_block,
            "overhead_ms": found.speed.overhead_ms,
            "tokens_per_s_per_block": found.speed.tokens_per_s_per_block,
            "head_ms": found.speed.head_ms,
        }
    return {
        "version": JSON_VERSION,
        "model": found.checkpoint.name,
        "num_blocks": found.num_blocks,
        "dtype": found.dtype,
        "device": found.device,
        "free_bytes": found.free.num_bytes,
        "process_bytes": found.base_bytes,
        "cache_tokens": found.memory.cache_tokens,
        "state_bytes": found.memory.state_bytes,
        "weights": [
            {
                "dtype": kind.dtype,
                "quant_type": kind.quant_type,
                "block_bytes": kind.weights,
                "cache_bytes": kind.cache,
                "fitting": found.num_fitting(kind.dtype, kind.quant_type),
            }
            for kind in found.memory.kinds
        ],
        "timed": speed,
        "alone_tokens_per_s": found.alone,
        "swarm_of_such_machines": [
            {"servers": found.num_servers, "rtt_ms": rtt_ms, "tokens_per_s": rate}
            for rtt_ms, rate in found.swarms().items()
        ],
        "live_tokens_per_s": found.live,
        "live_error": found.no_chain or None,
        "verdict": found.verdict(),
        "assumed": found.assumptions(),
    }


if __name__ == "__main__":
    cli.run(PROG, main)
