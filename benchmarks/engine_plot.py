"""Plots `results/engine.json` and `engine_bfloat16.json` to `docs/images/engine.png`.

python benchmarks/engine_plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS

IMAGE = RESULTS.parents[1] / "docs" / "images" / "engine.png"


def main() -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cases: list[dict[str, Any]] = []
    for name in ("engine", "engine_bfloat16"):
        cases += json.loads((RESULTS / f"{name}.json").read_text())["cases"]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.6), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        own = [case for case in cases if case["dtype"] == dtype]
        for target in dict.fromkeys(case["target"] for case in own):
            line = [case for case in own if case["target"] == target]
            is_local = target == "local"
            axis.plot(
                [case["sessions"] for case in line],
                [case["tokens_per_s"] for case in line],
                label="local, one static batch" if is_local else f"{target} servers",
                color="black" if is_local else None,
                linestyle="--" if is_local else "-",
                marker="o",
            )
        axis.set(title=dtype, xlabel="sessions", ylabel="tokens/s, steady", ylim=(0, None))
        axis.set_xticks(sorted({case["sessions"] for case in own}))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    Path(IMAGE).parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=110)
    print(f"written to {IMAGE}")


if __name__ == "__main__":
    main()
