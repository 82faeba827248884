#!/usr/bin/env python3
"""Inject faults into simulated swarms, one swarm per seed, and print the seeds with violations.

    make simulate-faults SEEDS=10000 FIRST_SEED=0
    python scripts/simulate_faults.py --seeds 500 --servers 3:6 --faults crash=3 cut=1 lie=2

Servers, clients and faults are drawn from the seed, and so are the kinds of faults, unless --faults
names them. The same seed and options give the same swarm, faults and events every time.
The exit status is 1 if there was a violation. Ctrl-C ends with what has been found until then.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from planetserve.testing.fault_plan import FAULTS, SwarmShape
from planetserve.testing.fault_simulation import Outcome, simulate

_PROGRESS_PERIOD_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=200, help="number of swarms (200)")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first one (0)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (one per core)"
    )
    parser.add_argument(
        "--servers",
        type=bounds,
        default=(3, 20),
        metavar="MIN:MAX",
        help="number of servers (3:20)",
    )
    parser.add_argument(
        "--clients",
        type=bounds,
        default=(1, 3),
        metavar="MIN:MAX",
        help="number of clients (1:3)",
    )
    parser.add_argument(
        "--faults",
        type=weight,
        nargs="+",
        default=(),
        metavar="NAME=WEIGHT",
        help=f"only these kinds of faults, by weight: {', '.join(FAULTS)}",
    )
    parser.add_argument(
        "--receipts", action="store_true", help="servers sign receipts, which clients compare"
    )
    options = parser.parse_args()
    shape = SwarmShape(
        options.servers, options.clients, tuple(options.faults), receipts=options.receipts
    )
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    totals = Totals(len(seeds))
    # Forked, because the imports take seconds and are done here; no thread runs yet.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(
        min(options.jobs, max(1, len(seeds))), mp_context=context, initializer=prepare
    )
    try:
        futures: list[Future[Outcome]] = [pool.submit(simulate, seed, shape) for seed in seeds]
        for future in as_completed(futures):
            totals.add(future.result())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    return totals.show()


def bounds(text: str) -> tuple[int, int]:
    """Minimum and maximum of `MIN:MAX`, or of one number."""
    least, _, most = text.partition(":")
    chosen = int(least), int(most or least)
    if not 1 <= chosen[0] <= chosen[1]:
        raise ValueError(text)
    return chosen


def weight(text: str) -> tuple[str, float]:
    """A kind of fault and its weight, 1 if not given."""
    name, _, value = text.partition("=")
    if name not in FAULTS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FAULTS)}")
    number = float(value or 1)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return name, number


def prepare() -> None:
    """Set up a worker: the parent handles Ctrl-C; imported modules are not scanned for garbage."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@dataclass
class Totals:
    """The results of all seeds so far."""

    num_seeds: int
    num_done: int = 0
    num_tokens: int = 0
    num_errors: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    bad: list[int] = field(default_factory=list)
    """Seeds with violations."""
    began_s: float = field(default_factory=time.monotonic)
    shown_s: float = field(default_factory=time.monotonic)

    def add(self, outcome: Outcome) -> None:
        """Count a seed, and print its violations."""
        self.num_done += 1
        self.num_tokens += outcome.num_tokens
        self.num_errors += outcome.num_errors
        self.faults += outcome.faults
        if outcome.violations:
            self.bad.append(outcome.seed)
            for text in outcome.violations:
                print(f"seed {outcome.seed}: {text}")
            print(f"  again: {repeat_command(outcome.seed)}", flush=True)
        if time.monotonic() >= self.shown_s + _PROGRESS_PERIOD_S:
            self.shown_s = time.monotonic()
            print(
                f"{self.num_done} of {self.num_seeds} seeds, {self.per_minute():.0f} a minute, "
                f"{len(self.bad)} with violations",
                file=sys.stderr,
                flush=True,
            )

    def per_minute(self) -> float:
        """Seeds done in a minute."""
        return 60 * self.num_done / max(time.monotonic() - self.began_s, 1e-9)

    def show(self) -> int:
        """Print the totals; the exit status."""
        print(
            f"{self.num_done} seeds, {self.num_tokens} tokens compared, {self.num_errors} steps "
            f"that failed during faults and were tried again; {self.per_minute():.0f} seeds a "
            "minute"
        )
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        print(f"faults and lies that occurred: {counts}")
        bad = sorted(self.bad)
        print(f"violations at seeds {bad}" if bad else "no violation")
        return 1 if bad else 0


def repeat_command(seed: int) -> str:
    """The command that shows a seed again."""
    rest, words = [], iter(sys.argv[1:])
    for word in words:
        name, is_joined, _ = word.partition("=")
        if name in ("--seeds", "--first-seed", "--jobs"):
            if not is_joined:
                next(words, None)
        else:
            rest.append(word)
    command = ["python", sys.argv[0], "--first-seed", str(seed), "--seeds", "1", *rest]
    return shlex.join(command)


if __name__ == "__main__":
    sys.exit(main())
