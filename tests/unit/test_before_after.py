"""`benchmarks/before_after.py`: a slower checkout is a loss, whichever of its numbers is slower."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(
            "before_after", BENCHMARKS / "before_after.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["before_after"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def committed(name: str) -> Any:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["engine", "failover", "crypto_cost", "startup"])
def test_every_number_that_is_compared_can_be_a_loss(tool: ModuleType, name: str) -> None:
    metrics = tool.BENCHMARKS[name].metrics(committed(name))
    assert metrics
    for changed in metrics:
        slower = {**metrics, changed: metrics[changed] * 1.1}
        rows = tool.compare([metrics] * 3, [slower] * 3)
        assert {row["metric"]: row["verdict"] for row in rows if row["verdict"] != "noise"} == {
            changed: "loss"
        }


def test_rounds_that_disagree_are_noise(tool: ModuleType) -> None:
    before, after = [{"ms": 10.0}] * 3, [{"ms": 9.0}, {"ms": 11.0}, {"ms": 11.0}]
    (row,) = tool.compare(before, after)
    assert row["verdict"] == "noise"
    assert row["ratio"] == pytest.approx(1.1)


def test_other_tokens_than_local_ones_end_the_comparison(tool: ModuleType) -> None:
    result = committed("engine")
    next(case for case in result["cases"] if case["target"] != "local")["equal_tokens"] -= 1
    with pytest.raises(SystemExit, match="tokens differ"):
        tool.engine_metrics(result)


def test_a_checkout_without_kernels_is_not_compared_with_one_that_has_them(
    tool: ModuleType, tmp_path: Path
) -> None:
    paths = {side: tmp_path / side for side in ("before", "after")}
    for path in paths.values():
        (path / "src/planetserve/native").mkdir(parents=True)
    tool.check_kernels(paths)
    (paths["after"] / "src/planetserve/native/_kernels.cpython-311.so").touch()
    with pytest.raises(SystemExit, match="before has no native kernels"):
        tool.check_kernels(paths)
