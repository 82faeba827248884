#!/usr/bin/env python3
"""Throw faults at simulated swarms, one for each seed, and print the seeds that show a violation.

    make simulate-faults SEEDS=10000 FIRST_SEED=0

A seed always gives the same swarm, faults and events: `--first-seed N --seeds 1` shows one again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from planetserve.testing.fault_simulation import Outcome, simulate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200, help="how many swarms")
    parser.add_argument("--first-seed", type=int, default=0, help="the seed of the first one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    began_s, outcomes = time.monotonic(), []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.jobs, max(1, len(seeds))), mp_context=spawn) as pool:
        for outcome in pool.map(simulate, seeds, chunksize=8):
            outcomes.append(outcome)
            show(outcome)
    return summary(outcomes, time.monotonic() - began_s)


def show(outcome: Outcome) -> None:
    """Print what a seed has violated."""
    for text in outcome.violations:
        print(f"seed {outcome.seed}: {text}", flush=True)


def summary(outcomes: list[Outcome], elapsed_s: float) -> int:
    """Print the totals; the exit status."""
    bad = [outcome.seed for outcome in outcomes if outcome.violations]
    tokens = sum(outcome.num_tokens for outcome in outcomes)
    errors = sum(outcome.num_errors for outcome in outcomes)
    rate = 60 * len(outcomes) / max(elapsed_s, 1e-9)
    print(
        f"{len(outcomes)} seeds, {tokens} tokens compared, {errors} steps that failed during "
        f"faults and were tried again; {rate:.0f} seeds a minute"
    )
    print(f"violations at seeds {bad}" if bad else "no violation")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
