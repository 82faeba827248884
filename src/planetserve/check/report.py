"""What came of a check, as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from planetserve.check.trial import CONTEXT, Batching, KindSizes, Report

JSON_VERSION = 1


def as_json(report: Report) -> str:
    """One JSON document with a final line break."""
    values: dict[str, Any] = {
        "version": JSON_VERSION,
        "is_served": report.is_equal,
        "reason": report.comparison.why_not_equal or None,
        **dataclasses.asdict(report),
    }
    error = report.comparison.max_error
    if error is not None and not math.isfinite(error):
        values["comparison"]["max_error"] = None  # JSON has no such numbers
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def refusal_as_json(model: str, reason: str) -> str:
    """The same of a model that is refused before anything is tried."""
    values = {"version": JSON_VERSION, "is_served": False, "reason": reason, "name": model}
    return json.dumps(values, indent=2) + "\n"


def as_text(report: Report) -> str:
    """The report for a terminal."""
    stored = f", stored as {report.quantization}" if report.quantization else ""
    lines = [f"{report.name}: {report.model_type}, {report.num_blocks} blocks{stored}", ""]
    lines += _comparison(report)
    if report.batching is not None:
        lines += _batching(report.batching, report.comparison.num_blocks)
    lines += ["", *_sizes(report.sizes)]
    if report.notes:
        lines += ["", "what is missing, and what to know:"]
        lines += [f"  - {note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _comparison(report: Report) -> Iterator[str]:
    found = report.comparison
    tried = "all" if found.num_blocks == report.num_blocks else f"the first {found.num_blocks}"
    local = "transformers' from_pretrained" if found.is_local_own else (
        "transformers' class with the weights that servers read"
    )  # fmt: skip
    yield f"cut between {tried} blocks, against {local}:"
    if found.max_error is None:
        yield "  parts of one block each cannot be loaded"
    else:
        yield (
            f"  logits {'equal' if found.is_equal else 'DIFFER'}: largest difference "
            f"{found.max_error:.1e}, where they have a standard deviation of {found.spread:.2g}; "
            f"{found.equal_tokens} of {found.num_tokens} most likely tokens equal"
        )
    for cut, reason in found.wrong_cuts.items():
        yield f"  cut before block {cut} alone: {reason}"


def _batching(batching: Batching, num_blocks: int) -> Iterator[str]:
    if batching.sessions is None:
        many = "sessions share a pass up to --max_batch_size tokens"
    elif batching.sessions == 1:
        many = "each session takes a pass of its own"
    else:
        many = f"up to {batching.sessions} sessions of {CONTEXT} tokens share a pass"
    why = f" ({batching.why})" if batching.why else ""
    yield f"batching: {batching.way}{why}; {many}"
    kept = []
    if batching.kv_bytes_per_token:
        kept.append(f"{batching.kv_bytes_per_token / 2**10:.1f} KiB per token of KV cache")
    if batching.state_bytes:
        kept.append(f"{batching.state_bytes / 2**20:.2f} MiB of states per session")
    yield f"  in bfloat16, {num_blocks} blocks take {' and '.join(kept)}"


def _sizes(sizes: Sequence[KindSizes]) -> Iterator[str]:
    yield "MiB per block, stored in the files and in a server's memory:"
    names = list(sizes[0].memory_bytes)
    yield "  " + "".join(f"{name:>10}" for name in ("stored", *names)) + "  blocks"
    for one in sizes:
        numbers = (one.stored_bytes, *one.memory_bytes.values())
        row = "".join(f"{number / 2**20:>10.2f}" for number in numbers)
        yield f"  {row}  {_ranges(one.kind.blocks)}: {one.kind.name}"


def _ranges(blocks: Sequence[int]) -> str:
    """Numbers with a dash for each run; of many runs the first few."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    more = f", ... ({len(blocks)} blocks)" if len(texts) > 6 else ""
    return ", ".join(texts[:6]) + more
