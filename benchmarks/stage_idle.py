"""How much of the time the servers of a chain have nothing to run while several sessions write.

    python benchmarks/stage_idle.py     two minutes; needs root and the cpu controller of cgroups v1

Client and servers of one machine share its cores: whoever works slows the others down, and a
server without a step may be one whose neighbour has no core. On machines of their own that cannot
happen. Here the chain runs twice within one invocation: with all processes on the same cores, and
with a fixed share of a core for the client and for each server, daemons included, which together
are no more than the machine has. So the second chain is one of slow machines that do not disturb
each other. Both rates are compared with that of a single session under the same conditions.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import engine
import psutil
from common import environment, load, table, write_result
from processes import make_checkpoint, prepare

CGROUPS = Path("/sys/fs/cgroup/cpu")
_PERIOD_US = 4000
"""Shorter than a pass, so that a share slows passes down instead of stopping some of them."""


@contextlib.contextmanager
def shares(groups: Sequence[tuple[Collection[int], float]]) -> Iterator[None]:
    """Limit groups of processes, each to so many cores, for as long as the block runs."""
    folders = []
    try:
        for index, (pids, cores) in enumerate(groups):
            folder = CGROUPS / f"planetserve-bench-{os.getpid()}-{index}"
            try:
                folder.mkdir()
                folders.append(folder)
                (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(str(round(cores * _PERIOD_US)))
            except OSError as error:
                raise SystemExit(
                    f"cannot limit processes ({error}); this benchmark needs root and the cpu "
                    f"controller of cgroups v1 at {CGROUPS}"
                ) from error
            for pid in pids:
                (folder / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for folder in folders:
            for pid in (folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    (CGROUPS / "cgroup.procs").write_text(pid)
            folder.rmdir()


def families(server_pids: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """The client's processes and each server's, children included."""
    servers = [
        [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        for pid in server_pids
    ]
    taken = {pid for server in servers for pid in server}
    own = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    return [pid for pid in own if pid not in taken], servers


def cpu_seconds(pids: Collection[int]) -> float:
    """Processor time so far of these processes."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(own.user + own.system for own in times)


def measure(
    bench: engine.Bench, swarm: engine.Swarm, sessions: int, processes: Sequence[Collection[int]]
) -> dict[str, Any]:
    """Rates of one and of several sessions; the servers' idle shares and the cores that each of
    `processes` uses while several write."""
    single = bench.run_swarm(swarm.client, 1).tokens_per_s
    before_s, started_s = [cpu_seconds(pids) for pids in processes], time.monotonic()
    run, idle_shares = engine.run_and_idle_shares(bench, swarm, sessions)
    elapsed_s = time.monotonic() - started_s
    used_s = [cpu_seconds(pids) - s for pids, s in zip(processes, before_s, strict=True)]
    return {
        "single_tokens_per_s": single,
        "tokens_per_s": run.tokens_per_s,
        "ratio": run.tokens_per_s / single,
        "idle_shares": idle_shares,
        "cores_used": [own_s / elapsed_s for own_s in used_s],
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--servers", type=int, default=3)
    add("--sessions", type=int, default=8)
    add("--server_cores", type=float, default=0.3, help="cores of each server")
    add("--client_cores", type=float, default=0.9, help="cores of the client")
    add("--rounds", type=int, default=3)
    add("--dtype", default="float32")
    add("--new_tokens", type=int, default=96)
    options = parser.parse_args(argv)
    wanted = options.servers * options.server_cores + options.client_cores
    if wanted > (cores := os.cpu_count() or 1):
        parser.error(f"{wanted:g} cores are asked for, this machine has {cores}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    prepare()
    result: dict[str, Any] = {
        "benchmark": "stage_idle",
        "environment": environment(),
        "settings": vars(options),
        "model": engine.SHAPE,
        "threads_per_process": 1,
    }
    swarm_options = engine.parse(
        ["--profile", "--chains", str(options.servers), "--sessions", str(options.sessions),
         "--new_tokens", str(options.new_tokens)]
    )  # fmt: skip
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as folder:
        checkpoint = make_checkpoint(Path(folder), engine.SHAPE)
        bench = engine.Bench(swarm_options, checkpoint)
        with engine.swarms(checkpoint, options.dtype, swarm_options) as found:
            (swarm,) = found.values()
            bench.run_swarm(swarm.client, 1)
            client, servers = families(swarm.pids)
            processes = [client, *servers]
            cores = [options.client_cores] + [options.server_cores] * options.servers
            for number in range(options.rounds):
                for name in ("same cores", "own share"):
                    engine.progress(f"round {number + 1}/{options.rounds}: {name}")
                    with contextlib.ExitStack() as stack:
                        if name == "own share":
                            stack.enter_context(shares(list(zip(processes, cores, strict=True))))
                        measured = measure(bench, swarm, options.sessions, processes)
                    runs.append({"cores": name, "round": number, **measured})
    result["runs"] = runs
    result["load_after"] = load()
    lines = [
        [run["cores"], run["single_tokens_per_s"], run["tokens_per_s"], run["ratio"],
         ", ".join(f"{share:.0%}" for share in run["idle_shares"]),
         ", ".join(f"{used:.2f}" for used in run["cores_used"])]
        for run in sorted(runs, key=lambda run: run["cores"], reverse=True)
    ]  # fmt: skip
    header = ["", "1 session, tokens/s", f"{options.sessions} sessions", "ratio",
              "servers without a step to run", "cores used: client, servers"]  # fmt: skip
    print(table(header, lines))
    print(f"written to {write_result('stage_idle', result)}")


if __name__ == "__main__":
    main()
