"""Linear layers and experts whose weights keep the 4 or 8 bits a number that the checkpoint stores.

A decode step reads every weight once, so fewer bytes are faster, and a span takes the memory of its
files. Which stored rows become which rows of a parameter follows from transformers' own conversions
(renaming, stacking of experts, fusing), which are run on numbers of rows instead of weights. What
has no kernels here, or goes through a conversion that mixes inputs, is dequantised as before.

CPU only (`planetserve.native`).
"""

from __future__ import annotations

import bisect
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from planetserve.errors import ModelError
from planetserve.model import experts
from planetserve.model.loading import StoredSource, WeightLoader
from planetserve.native import library
from planetserve.native.quantized import Numbers, QuantizedWeight

logger = logging.getLogger(__name__)

_CHECKED_ROWS = (1, 3, 9)
_TOLERANCE = 1e-5
_SEED = 6


class QuantizedLinear(nn.Module):
    """A linear layer over a `QuantizedWeight`. Sums are float32, results in the input's dtype."""

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = weight.num_inputs, weight.num_outputs
        self.quantized = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._bias_O = None if bias is None else bias.float().contiguous()
        self._dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        """A dequantised copy `[outputs, inputs]`: right for code that reads it, and slow."""
        return self.quantized.dense(self._dtype)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TK = x.reshape(-1, self.in_features).float().contiguous()
        y_TO = self.quantized.multiply(x_TK, self._bias_O)
        return y_TO.to(x.dtype).view(*x.shape[:-1], self.out_features)


def can_keep(device: torch.device | str) -> bool:
    """Whether there are kernels for stored weights on a device."""
    kernels = library.kernels()
    return (
        torch.device(device).type == "cpu"
        and kernels is not None
        and kernels.reads_quantized_weights
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows `[start, end)` of one of a source's matrices."""

    source: int
    matrix: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """A parameter that keeps its stored numbers: for each of its matrices, where its rows are."""

    sources: tuple[StoredSource, ...]
    matrices: tuple[tuple[_Rows, ...], ...]
    is_transposed: bool
    """Whether the parameter is `[..., inputs, outputs]`."""


class StoredWeights:
    """Fills linear layers and experts of a model's blocks with the numbers that are stored.

    Args:
        model: the skeleton that `loader` fills.
        loader: reads the rest.
        dtype: the span's.
    """

    def __init__(self, model: nn.Module, loader: WeightLoader, dtype: torch.dtype):
        self._model = model
        self._loader = loader
        self._dtype = dtype
        self._plans: dict[str, _Kept] = {}
        self._checked: set[str] = set()

    def plan(self, block: nn.Module) -> int:
        """Find out which parameters of a block can keep their numbers; returns the bytes that this
        saves."""
        known = set(self._plans)
        for path, module in self._modules(block):
            if type(module) is nn.Linear:
                self._plan_all(path, ["weight"], is_transposed=False)
            elif experts.has_experts(module):
                # All or nothing: the module's code changes.
                self._plan_all(path, experts.weight_names(module),
                               is_transposed=bool(module.is_transposed))  # fmt: skip

        saved = 0
        for name in set(self._plans) - known:
            dense = self._loader.expected_shape(name).numel() * self._dtype.itemsize
            saved += dense - sum(source.num_bytes for source in self._plans[name].sources)
        return saved

    def keeps(self, name: str) -> bool:
        """Whether the parameter of this full name keeps its numbers."""
        return name in self._plans

    def fill(self, block: nn.Module) -> None:
        """Replace what `plan` found in a block; everything else in it has been loaded.

        Raises:
            ModelError: a tensor cannot be read, or the kernels compute something else here.
        """
        for path, module in self._modules(block):
            if self.keeps(f"{path}.weight"):
                (weight,) = self._weights(f"{path}.weight")
                owner, _, name = path.rpartition(".")
                made = QuantizedLinear(weight, module.bias, self._dtype)
                setattr(self._model.get_submodule(owner), name, made)
            elif experts.has_experts(module) and self.keeps(
                f"{path}.{experts.weight_names(module)[0]}"
            ):
                self._fill_experts(path, module)

    def _fill_experts(self, path: str, module: Any) -> None:
        weights = {name: self._weights(f"{path}.{name}") for name in experts.weight_names(module)}

        def make(layer: nn.Module, name: str) -> nn.Module:
            return QuantizedLinear(next(weights[name]), layer.bias, self._dtype)

        experts.split(module, make)
        for part in module.modules():
            # transformers' own mark, without which it would fill weights with random numbers.
            part._is_hf_initialized = True  # noqa: SLF001

    def _modules(self, block: nn.Module) -> list[tuple[str, nn.Module]]:
        root = next(path for path, module in self._model.named_modules() if module is block)
        return list(block.named_modules(prefix=root))

    def _plan_all(self, path: str, names: Iterable[str], *, is_transposed: bool) -> None:
        plans = {name: self._plan(f"{path}.{name}", is_transposed) for name in names}
        found = {f"{path}.{name}": plan for name, plan in plans.items() if plan is not None}
        if len(found) == len(plans):
            self._plans.update(found)

    def _plan(self, target: str, is_transposed: bool) -> _Kept | None:
        sources, converter = self._loader.stored_sources(target)
        if not sources or any(s.shape is None or not s.has_numbers for s in sources):
            return None
        shape = self._loader.expected_shape(target)
        ids = self._row_ids(sources, converter, is_transposed)
        if ids is None:
            return None
        rows_axis = -1 if is_transposed else -2
        width = shape[-2] if is_transposed else shape[-1]
        if (
            ids.dim() != len(shape)
            or ids.shape[:-2] != shape[:-2]
            or ids.shape[rows_axis] != shape[rows_axis]
            or ids.numel() != ids.shape[:-2].numel() * shape[rows_axis]
            or any(source.width != width for source in sources)
        ):
            return None
        matrices = ids.reshape(-1, shape[rows_axis])
        rows = tuple(tuple(_runs(row, sources)) for row in matrices)
        return _Kept(tuple(sources), rows, is_transposed)

    def _row_ids(
        self, sources: list[StoredSource], converter: Any, is_transposed: bool
    ) -> torch.Tensor | None:
        """A parameter with the numbers of rows, over all sources, in the place of weights."""
        ids, first = [], 0
        for source in sources:
            count = source.num_matrices * source.height
            own = torch.arange(first, first + count).view(*source.shape[:-2], source.height, 1)
            ids.append(own.transpose(-1, -2) if source.is_transposed else own)
            first += count
        if converter is None:
            return ids[0] if len(ids) == 1 else None
        collected: dict[str, Any] = {}
        for source, own in zip(sources, ids, strict=True):
            collected.setdefault(source.pattern or "", []).append(own)
        try:
            for operation in converter.operations:
                collected = operation.convert(
                    collected,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=sources[0].target,
                    model=self._model,
                    config=self._model.config,
                    missing_keys=None,
                )
        except Exception as error:  # noqa: BLE001 - an operation that needs real weights
            logger.debug("%s is dequantised: %s", sources[0].target, error)
            return None
        found = list(collected.values())
        result = found[0][0] if found and isinstance(found[0], list) else found[0]
        return result if len(found) == 1 and isinstance(result, torch.Tensor) else None

    def _weights(self, target: str) -> Iterator[QuantizedWeight]:
        """The matrices of a parameter, in their order, read when they are asked for."""
        plan = self._plans[target]
        opened = _OpenSources(self._loader, plan.sources)
        kind = re.sub(r"\d+", "N", target)
        expected: torch.Tensor | None = None
        if kind not in self._checked:
            self._checked.add(kind)
            self._loader.load(lambda name: name == target)
            expected = self._model.get_parameter(target).detach()
        for index, matrix in enumerate(plan.matrices):
            parts = [opened.rows(rows) for rows in matrix]
            try:
                weight = QuantizedWeight(parts)
            except ValueError as error:
                raise ModelError(
                    f"{self._loader.model_name}: {target} cannot keep its stored numbers: "
                    f"{error}; serve it with --quant_type none"
                ) from error
            if expected is not None:
                dense = expected if expected.dim() == 2 else expected[index]
                self._check(target, weight, dense.t() if plan.is_transposed else dense)
            yield weight

    def _check(self, target: str, weight: QuantizedWeight, expected_OK: torch.Tensor) -> None:
        """Compare a weight with the dequantised one, as to its numbers and its products."""
        dense_OK = weight.dense(torch.float32)
        half = expected_OK.dtype != torch.float32
        rounding = torch.finfo(expected_OK.dtype).eps if half else _TOLERANCE
        found = [(dense_OK, expected_OK.float(), rounding)]
        generator = torch.Generator().manual_seed(_SEED)
        for rows in _CHECKED_ROWS:
            x_TK = torch.randn(rows, weight.num_inputs, generator=generator)
            found.append((weight.multiply(x_TK, None), F.linear(x_TK, dense_OK), _TOLERANCE))
        for actual, expected, tolerance in found:
            if not (actual - expected).norm() <= tolerance * expected.norm():
                raise ModelError(
                    f"{self._loader.model_name}: {target} as it is stored computes something else "
                    "than dequantised; serve it with --quant_type none"
                )


class _OpenSources:
    """Reads a parameter's sources one after the other, and keeps the latest of each."""

    def __init__(self, loader: WeightLoader, sources: tuple[StoredSource, ...]):
        self._loader = loader
        self._sources = sources
        self._latest: dict[int, tuple[int, Numbers, Iterator[Numbers]]] = {}

    def rows(self, wanted: _Rows) -> Numbers:
        index, found, numbers = self._latest.pop(wanted.source, (-1, None, None))
        if numbers is None or index > wanted.matrix:
            index, numbers = -1, self._loader.numbers(self._sources[wanted.source])
        while index < wanted.matrix:
            found, index = next(numbers), index + 1
        if found is None:
            raise ValueError("a source has fewer matrices than its header says")
        if self._sources[wanted.source].num_matrices > 1:
            self._latest[wanted.source] = (index, found, numbers)
        part = slice(wanted.start, wanted.end)
        return Numbers(
            found.codes_OK[part],
            None if found.scales_OG is None else found.scales_OG[part],
            None if found.zeros_OG is None else found.zeros_OG[part],
            found.factors_O[part],
            found.table,
        )


def _runs(ids: torch.Tensor, sources: Sequence[StoredSource]) -> Iterator[_Rows]:
    """Neighbouring rows of one matrix, together."""
    counts = [source.num_matrices * source.height for source in sources]
    firsts = list(itertools.accumulate(counts, initial=0))[:-1]
    starts = [
        torch.arange(first, first + count, source.height)
        for first, count, source in zip(firsts, counts, sources, strict=True)
    ]
    is_new = (ids[1:] != ids[:-1] + 1) | torch.isin(ids[1:], torch.cat(starts))
    ends = [*(is_new.nonzero().flatten() + 1).tolist(), len(ids)]
    for start, end in itertools.pairwise([0, *ends]):
        first = int(ids[start])
        index = bisect.bisect_right(firsts, first) - 1
        matrix, row = divmod(first - firsts[index], sources[index].height)
        yield _Rows(index, matrix, row, row + end - start)
