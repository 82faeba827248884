"""What the head of a client costs per call: the kernel for a few rows against PyTorch's product.

    python benchmarks/head.py [--rounds 30]

One thread. Each call takes a ninth of a weight of its own, in turn, so that no cache holds it; the
least of all rounds counts, times nine. Results go to `benchmarks/results/head.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from common import environment, load, table, write_result

from planetserve.model import few_rows

SHAPES = ((32000, 2048, "float32"), (32000, 2048, "bfloat16"), (50257, 768, "float32"))
ROWS = (1, 4, 8, 16)
PARTS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="calls of each kind (default: 30)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    settings = environment()
    cells = []
    for outputs, inputs, dtype in SHAPES:
        weight = torch.randn(outputs, inputs).to(getattr(torch, dtype))
        for rows in ROWS:
            plain_ms, kernel_ms = measure(weight, rows, rounds)
            cells.append((f"{outputs}x{inputs}", dtype, rows, plain_ms, kernel_ms))
    header = ("weight", "dtype", "rows", "pytorch_ms", "kernel_ms")
    sys.stdout.write(table(header, cells) + "\n")
    result = {
        "environment": settings,
        "load_after": load(),
        "products": [dict(zip(header, cell, strict=True)) for cell in cells],
    }
    sys.stdout.write(f"{write_result('head', result)}\n")


@torch.inference_mode()
def measure(weight: torch.Tensor, rows: int, rounds: int) -> list[float]:
    """Milliseconds of PyTorch's product and of the kernel, with the whole weight."""
    x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
    parts = weight[: len(weight) // PARTS * PARTS].chunk(PARTS)
    forms = (partial(F.linear, x), partial(few_rows.linear, x))
    least_s = [float("inf")] * len(forms)
    for number in range(rounds * len(forms)):
        form = number % len(forms)
        part = parts[number % PARTS]
        begin_s = time.perf_counter()
        forms[form](part)
        least_s[form] = min(least_s[form], time.perf_counter() - begin_s)
    return [round(seconds * PARTS * 1000, 2) for seconds in least_s]


if __name__ == "__main__":
    main()
