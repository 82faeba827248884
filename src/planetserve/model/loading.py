"""Build a checkpoint's own model class without memory, then fill in only the weights asked for.

All uses of transformers' loading internals are in this module: construction on the meta device, the
renaming and fusing of checkpoint tensors into parameters (`core_model_loading`), tied weights, and
the buffers that are computed instead of stored. Parameters that were not asked for stay on the meta
device and take no memory.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging

from planetserve.errors import ModelError, one_line
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.text_config import text_config
from planetserve.model.weights import Weights
from planetserve.native.quantized import Numbers

Wanted = Callable[[str], bool]
"""Whether a parameter of this full name is to be read."""


def build_on_meta(
    checkpoint: Checkpoint, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The checkpoint's own class with every parameter and buffer on the meta device.

    `attn_implementation=None` is what `from_pretrained` would choose: SDPA where the family has it,
    else eager. Call `load_parameters` and then `materialize_buffers` to make parts of it real.

    Raises:
        ModelError: transformers has no causal-LM class for it, or cannot build it.
    """
    config = copy.deepcopy(checkpoint.config)
    for part in (config, text_config(config)):
        # The module `weights` handles how weights are stored.
        part.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            # Always given: the name in a configuration may be a repository of kernels.
            model = model_class(config).from_config(
                config,
                dtype=dtype,
                trust_remote_code=False,
                attn_implementation=attn_implementation,
                experts_implementation=None,
            )
    except (
        ValueError,
        ImportError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        reason = one_line(error, 300) or type(error).__name__
        raise ModelError(f"{checkpoint.name}: transformers cannot build it: {reason}") from error
    parameters = list(inspect.signature(model.forward).parameters.values())
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if needed not in ([], ["input_ids"]):
        raise ModelError(
            f"{checkpoint.name} ({config.model_type}) cannot be served: it writes no text without "
            f"{' and '.join(n for n in needed if n != 'input_ids')}"
        )
    model.eval()
    model.requires_grad_(False)
    return model


def load_parameters(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    wanted: Wanted,
    dtype: torch.dtype,
    device: torch.device | str,
    quantizer: HfQuantizer | None = None,
) -> None:
    """Read the parameters whose full names satisfy `wanted` into `model`, in place.

    See `WeightLoader`.

    Raises:
        ModelError: a wanted parameter is not in the checkpoint, or has another shape there.
    """
    loader = WeightLoader(model, checkpoint, dtype, device, quantizer)
    loader.prepare(wanted)
    loader.load(wanted)


def model_class(config: PretrainedConfig) -> type[Any]:
    """The class of transformers that loads models of this configuration to generate text."""
    # A multimodal model can be in both tables, in that of language models with another class.
    is_language_model = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if is_language_model and text_config(config) is config:
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


class WeightLoader:
    """Reads parameters of one checkpoint into one model, in as many portions as the caller likes.

    Only the checkpoint tensors that wanted parameters are made of are read. Peak memory is the
    wanted bytes plus, at most, those of the portion under way. Parameters that a family keeps in
    float32 stay float32, as with `from_pretrained`. Tied parameters (a head that is the embedding)
    count as loaded.

    Args:
        model: a skeleton.
        checkpoint: its weights.
        dtype: of the loaded parameters.
        device: where they go.
        quantizer: that of `quantization.prepare_for_quantization`, if the model was prepared by it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str,
        quantizer: HfQuantizer | None = None,
    ):
        self._model = model
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = torch.device(device)
        self._quantizer = quantizer
        self._weights = Weights(checkpoint)
        self._sources = _find_sources(model, self._weights.names)
        self._by_target: dict[str, list[_Source]] = {}
        for source in self._sources:
            self._by_target.setdefault(source.target, []).append(source)

    def stored_bytes(self, wanted: Wanted) -> int:
        """Bytes that the parameters take in the checkpoint.

        Raises:
            ModelError: a header cannot be read.
        """
        return self._checkpoint.tensor_bytes(
            tensor
            for source in self._wanted(wanted)
            for tensor in self._weights.tensor_names_of(source.name)
        )

    def prepare(self, wanted: Wanted) -> None:
        """Refuse what the headers show to be wrong, then download the files.

        Raises:
            ModelError: as said, or a file cannot be fetched.
        """
        sources = self.check(wanted)
        self._checkpoint.fetch_shards(
            tensor for source in sources for tensor in self._weights.tensor_names_of(source.name)
        )

    def check(self, wanted: Wanted) -> list[_Source]:
        """The tensors that the parameters are made of. Reads headers alone.

        Raises:
            ModelError: one is missing, or cannot become what the model asks for.
        """
        sources = self._wanted(wanted)
        for source in sources:
            self._check_stored(source)
        filled = {source.target for source in sources}
        # One source may become several parameters, of which only the first is known by name.
        if not any(source.becomes_several for source in self._sources):
            tied = _tied_names(self._model)
            self._check_none_missing(
                n for n in self._model.state_dict() if wanted(n) and n not in filled | tied
            )
        return sources

    def load(self, wanted: Wanted) -> None:
        """Read the parameters whose full names satisfy `wanted`.

        Raises:
            ModelError: one is not in the checkpoint, or cannot become what the model asks for.
        """
        model, name = self._model, self._checkpoint.name
        stored = {
            s.name: _LazyTensor(self._weights, s.name, self._dtype) for s in self._wanted(wanted)
        }
        load_config = LoadStateDictConfig(
            pretrained_model_name_or_path=name,
            device_map={"": self._device},
            dtype=self._dtype,
            dtype_plan=model._get_dtype_plan(self._dtype),  # noqa: SLF001  float32 islands
            weight_mapping=get_model_conversion_mapping(model),
            hf_quantizer=self._quantizer,
        )
        with _quiet(), torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(model, stored, load_config)
        if info.conversion_errors:
            target, trace = next(iter(info.conversion_errors.items()))
            reason = (str(trace).strip().splitlines() or ["unknown error"])[-1]
            raise ModelError(f"{name}: cannot convert the weights of {target}: {reason}")
        if info.mismatched_keys:
            target, found, expected = next(iter(info.mismatched_keys))
            raise ModelError(
                f"{name}: {target} has shape {tuple(found)} in the checkpoint, but the "
                f"configuration asks for {tuple(expected)}"
            )
        if any(wanted(tied) and tied in info.missing_keys for tied in _tied_names(model)):
            model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model.requires_grad_(False)
        self._check_none_missing(
            n for n, v in model.state_dict().items() if v.is_meta and wanted(n)
        )

    @property
    def model_name(self) -> str:
        """For messages."""
        return self._checkpoint.name

    def expected_shape(self, target: str) -> torch.Size:
        """Of a parameter, as the configuration asks for it."""
        return self._model.get_parameter(target).shape

    def stored_sources(self, target: str) -> tuple[list[StoredSource], WeightConverter | None]:
        """The stored weights that a parameter is made of, and how; none if any is not stored in
        a format of its own."""
        sources = self._by_target.get(target, [])
        found = []
        for source in sources:
            layout = self._weights.layout(source.name)
            if layout is None or layout.shape is None:
                return [], None
            found.append(
                StoredSource(
                    source.name, target, source.pattern, layout.shape, layout.is_transposed,
                    layout.numbers is not None,
                    self._checkpoint.tensor_bytes(self._weights.tensor_names_of(source.name)),
                )
            )  # fmt: skip
        converters = {id(s.converter): s.converter for s in sources}
        return (found, sources[0].converter) if len(converters) == 1 else ([], None)

    def numbers(self, source: StoredSource) -> Iterator[Numbers]:
        """The matrices of a stored weight, one after the other."""
        return self._weights.numbers(source.name)

    def _check_stored(self, source: _Source) -> None:
        """Refuse a weight that cannot become a part of its parameter, going by its headers."""
        name = self._checkpoint.name
        dtype, shape = self._weights.check(source.name)
        # A quantizer has replaced weights by integers, but they are read as they were.
        is_weight = source.expected.is_floating_point() or self._quantizer is not None
        if is_weight and dtype is not None and dtype not in _PLAIN:
            raise ModelError(
                f"{name}: {source.name} is stored as {str(dtype).removeprefix('torch.')}, which "
                "means nothing without scales, and config.json names no format that has them "
                "there; give the bfloat16 or float16 checkpoint"
            )
        expected = tuple(source.expected.shape)
        if source.is_whole and self._quantizer is None and shape not in (None, expected):
            raise ModelError(
                f"{name}: {source.target} has shape {shape} in the checkpoint, but the "
                f"configuration asks for {expected}; config.json and weights are not of one model"
            )

    def _wanted(self, wanted: Wanted) -> list[_Source]:
        return [source for source in self._sources if wanted(source.target)]

    def _check_none_missing(self, names: Iterable[str]) -> None:
        missing = list(names)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelError(
                f"{self._checkpoint.name} lacks weights its configuration asks for: "
                f"{', '.join(missing[:3])}{more}; download or copy the whole model folder again"
            )


def make_empty_parameters(layers: nn.ModuleList, device: torch.device | str) -> None:
    """Give layers on the meta device memory for their parameters, without values, and buffers of
    zeros."""
    for module in layers.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device=device))


def materialize_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Give `model` its computed buffers (rotary frequencies, masks), as `from_pretrained` does.

    Call it after loading and after dropping the parts that stay on the meta device, so that buffers
    of dropped layers take no memory.
    """
    device = torch.device(device)
    for path, buffer in list(model.named_non_persistent_buffers()):
        if buffer.is_meta:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, torch.empty_like(buffer, device=device))
    with torch.no_grad():
        model.initialize_weights()


class _LazyTensor:
    """A placeholder for one weight in a state dict; indexing it reads the weight from the file."""

    def __init__(self, weights: Weights, name: str, dtype: torch.dtype):
        self._weights = weights
        self._name = name
        self._dtype = dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._weights.read(self._name, self._dtype)[index]


@dataclass(frozen=True, slots=True)
class _Source:
    """One tensor of the checkpoint and the parameter that it becomes, or becomes part of."""

    name: str
    target: str
    expected: torch.Tensor
    """The parameter as the model has it, on the meta device."""
    is_whole: bool
    """Whether the parameter is this tensor and nothing else."""
    becomes_several: bool
    """Whether other parameters may be parts of this tensor too."""
    pattern: str | None
    converter: WeightConverter | None
    """What makes the parameter of this and other tensors, and as which of its patterns."""


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A weight that is stored in a format of its own, and the parameter that it is a part of.

    Attributes:
        name: of the weight.
        target: the parameter.
        pattern: which of a converter's patterns it is; None without one.
        shape: after dequantising.
        is_transposed: whether its matrices are stored the other way round.
        has_numbers: whether `WeightLoader.numbers` gives them.
        num_bytes: of its tensors in the checkpoint.
    """

    name: str
    target: str
    pattern: str | None
    shape: tuple[int, ...]
    is_transposed: bool
    has_numbers: bool
    num_bytes: int

    @property
    def height(self) -> int:
        """Outputs of a matrix as it is stored."""
        return self.shape[-1] if self.is_transposed else self.shape[-2]

    @property
    def width(self) -> int:
        """Inputs of a matrix."""
        return self.shape[-2] if self.is_transposed else self.shape[-1]

    @property
    def num_matrices(self) -> int:
        return math.prod(self.shape[:-2])


def _find_sources(model: PreTrainedModel, names: Iterable[str]) -> list[_Source]:
    """The tensors that end up in parameters, going by their names."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    several = {
        pattern for c in converters if len(c.target_patterns) > 1 for pattern in c.source_patterns
    }
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    targets = model.state_dict()
    found = []
    # The order is the one the loader uses: some renamings depend on what came before.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets and name in targets:
            target, pattern = rename_source_key(name, [], [], prefix, targets)
        expected = targets.get(target)
        if expected is not None:
            found.append(
                _Source(
                    name, target, expected, pattern is None, pattern in several,
                    pattern, of_pattern.get(pattern or ""),
                )
            )  # fmt: skip
    return found


_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes of weights that need no separate scale."""


def _tied_names(model: PreTrainedModel) -> set[str]:
    tied = model.all_tied_weights_keys
    return {*tied.keys(), *tied.values()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Disable transformers' own progress bar, which would count tensors that are not read."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def has_meta_parameters(module: nn.Module) -> bool:
    """Whether any parameter or buffer under `module` has no memory."""
    return any(value.is_meta for value in module.state_dict(keep_vars=True).values())
