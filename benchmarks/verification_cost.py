"""What receipts and the manifest of weights cost: hashing, signing, and loading while hashing.

    python benchmarks/verification_cost.py            2 minutes
    python benchmarks/verification_cost.py --quick    seconds, for a look

Nothing is started: each part is timed alone, in this process, on one thread; the best of several
rounds counts.

- *hash*: BLAKE3 and SHA-256 on one token's hidden state, from a small model's to the largest.
- *digest*: what one end of an edge takes for a decode step of one row, and per token of a prompt.
- *receipt*: a hop signs one and a client checks it, once in 32 steps.
- *manifest*: reading a checkpoint's tensors as a server does, without hashing and with it.

Results go to `benchmarks/results/verification_cost.json`; a table goes to stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from blake3 import blake3
from common import environment, load, table, write_result
from safetensors.torch import save_file

from planetserve.crypto.identity import Identity
from planetserve.edge.chunk import StepChunk
from planetserve.model.manifest import TensorHasher
from planetserve.model.shards import read_header, read_tensor
from planetserve.tensors import tensor_bytes
from planetserve.verification.digest import EdgeDigest
from planetserve.verification.receipt import RECEIPT_STEPS, Receipt
from planetserve.wire.frame import WireDtype
from planetserve.wire.step import RowSlice, StepTable

SESSION = bytes(16)
WIDTHS = {"768 float32": (768, torch.float32), "4096 bfloat16": (4096, torch.bfloat16),
          "8192 bfloat16": (8192, torch.bfloat16)}  # fmt: skip
PROMPT_TOKENS = 512


def best_s(work: Callable[[], Any], rounds: int, number: int) -> float:
    """Processor time in seconds that one call takes, in the best round of `number` calls."""
    times = []
    for _ in range(rounds):
        began_s = time.process_time()
        for _ in range(number):
            work()
        times.append((time.process_time() - began_s) / number)
    return min(times)


def hash_us(rounds: int) -> dict[str, dict[str, float]]:
    found = {}
    for num_bytes in (1536, 3072, 8192, 16384, 65536):
        data = os.urandom(num_bytes)
        found[str(num_bytes)] = {
            "blake3": 1e6 * best_s(lambda data=data: blake3(data).digest(), rounds, 2000),
            "sha256": 1e6 * best_s(lambda data=data: hashlib.sha256(data).digest(), rounds, 2000),
        }
    return found


def digest_us(width: int, dtype: torch.dtype, rounds: int, sign_us: float) -> dict[str, float]:
    """Of a decode step of one row, and of each token of a prompt, at one end of an edge; and what
    a hop, which has two ends, spends on receipts in a decode step."""
    digest = EdgeDigest(SESSION, 1)
    digest.start(1, 0, 0)
    one_TD = torch.ones(1, width, dtype=dtype)
    prompt_TD = torch.ones(PROMPT_TOKENS, width, dtype=dtype)
    number = 0

    def decode() -> None:
        nonlocal number
        number += 1
        table = StepTable((RowSlice(0, PROMPT_TOKENS + number, 1),))
        digest(StepChunk(number, 0, 1, 0, table, one_TD), tensor_bytes(one_TD))

    def prompt() -> None:
        nonlocal number
        number += 1
        table = StepTable((RowSlice(0, 0, PROMPT_TOKENS),))
        digest(StepChunk(number, 0, 1, 0, table, prompt_TD), tensor_bytes(prompt_TD))

    decode_us = 1e6 * best_s(decode, rounds, 1000)
    return {
        "decode_step": decode_us,
        "prompt_token": 1e6 * best_s(prompt, rounds, 10) / PROMPT_TOKENS,
        "hop_decode_step": 2 * decode_us + sign_us / RECEIPT_STEPS,
    }


def receipt_us(rounds: int) -> dict[str, float]:
    digest, identity = EdgeDigest(SESSION, 1), Identity.generate()
    digest.start(1, 0, 0)
    state = digest.state(with_rows=True)
    receipt = Receipt(
        SESSION, bytes(32), 0, 4, WireDtype.FLOAT32, 0, bytes(32), 0, True, state, state, 1, 2
    )
    data = receipt.sign(identity)
    return {
        "sign": 1e6 * best_s(lambda: receipt.sign(identity), rounds, 200),
        "check": 1e6 * best_s(lambda: Receipt.open(data, identity.peer_id), rounds, 200),
    }


def manifest_s(rounds: int, mib: int) -> dict[str, float]:
    """Seconds to read a file of bfloat16 tensors of 32 MiB each that the system has in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        tensors = {str(n): torch.zeros(4096, 4096, dtype=torch.bfloat16) for n in range(mib // 32)}
        save_file(tensors, path)
        entries = list(read_header(path).values())

        def plain() -> None:
            for entry in entries:
                read_tensor(path, entry)

        def hashed() -> None:
            for entry in entries:
                hasher = TensorHasher(entry)
                read_tensor(path, entry, hasher.update)
                hasher.finish()

        plain()
        return {
            "MiB": float(mib),
            "read": best_s(plain, rounds, 1),
            "read and hashed": best_s(hashed, rounds, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, and no file is written")
    options = parser.parse_args()
    rounds = 1 if options.quick else 7
    receipt = receipt_us(rounds)
    result: dict[str, Any] = {
        "environment": environment(),
        "load_before": load(),
        "hash_us": hash_us(rounds),
        "digest_us": {
            name: digest_us(*shape, rounds, receipt["sign"]) for name, shape in WIDTHS.items()
        },
        "receipt_us": receipt,
        "manifest_s": manifest_s(rounds, 128 if options.quick else 512),
    }
    rows = [[n, *(f"{us:.1f}" for us in times.values())] for n, times in result["hash_us"].items()]
    print(table(["bytes", "BLAKE3, us", "SHA-256, us"], rows))
    rows = [[n, *(f"{us:.1f}" for us in t.values())] for n, t in result["digest_us"].items()]
    print(table(["hidden state", "decode step, us", "prompt token, us", "per hop, us"], rows))
    print(f"receipt: {receipt['sign']:.0f} us to sign, {receipt['check']:.0f} us to check")
    read = result["manifest_s"]
    share = read["read and hashed"] / read["read"] - 1
    print(f"{read['MiB']:.0f} MiB of weights: {read['read']:.2f} s, hashing adds {share:.0%}")
    if not options.quick:
        write_result("verification_cost", result)


if __name__ == "__main__":
    main()
