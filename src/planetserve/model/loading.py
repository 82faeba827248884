"""Build a checkpoint's own model class without memory, then fill in only the weights asked for.

Everything that leans on transformers' loading internals is here and nowhere else: construction on
the meta device, the renaming and fusing of checkpoint tensors into parameters
(`core_model_loading`), tied weights, and the buffers that are computed instead of stored.
Parameters that nobody asked for stay on the meta device and cost nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging

from planetserve.errors import ModelError, one_line
from planetserve.model.checkpoint import Checkpoint


def build_on_meta(
    checkpoint: Checkpoint, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The checkpoint's causal-LM class with every parameter and buffer on the meta device.

    `attn_implementation=None` is what `from_pretrained` would choose: SDPA where the family has it,
    else eager. Call `load_parameters` and then `materialize_buffers` to make parts of it real.

    Raises:
        ModelError: transformers has no causal-LM class for it, or cannot build it.
    """
    config = copy.deepcopy(checkpoint.config)
    try:
        with torch.device("meta"):
            # Given in any case: what a configuration names may be a repository of kernels.
            model = AutoModelForCausalLM.from_config(
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
    model.eval()
    model.requires_grad_(False)
    return model


def load_parameters(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    wanted: Callable[[str], bool],
    dtype: torch.dtype,
    device: torch.device | str,
    quantizer: HfQuantizer | None = None,
) -> None:
    """Read the parameters whose full names satisfy `wanted` into `model`, in place.

    Only the checkpoint tensors those parameters are made of are read, one at a time, so peak memory
    is the wanted bytes plus a few tensors. Families' float32 islands are kept as `from_pretrained`
    keeps them. Tied parameters (a head that is the embedding) count as loaded. `quantizer` is that
    of `quantization.prepare_for_quantization`, if the model was prepared by it.

    Raises:
        ModelError: a wanted parameter is not in the checkpoint, or has another shape there.
    """
    names = _source_names(model, checkpoint, wanted, quantizer)
    checkpoint.fetch_shards(names)
    state = {name: _LazyTensor(checkpoint, name) for name in names}
    load_config = LoadStateDictConfig(
        pretrained_model_name_or_path=checkpoint.name,
        device_map={"": torch.device(device)},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),  # noqa: SLF001  float32 islands
        weight_mapping=get_model_conversion_mapping(model),
        hf_quantizer=quantizer,
    )
    with _quiet(), torch.no_grad():
        info, _ = convert_and_load_state_dict_in_model(model, state, load_config)
    if info.conversion_errors:
        name, trace = next(iter(info.conversion_errors.items()))
        reason = (str(trace).strip().splitlines() or ["unknown error"])[-1]
        raise ModelError(f"{checkpoint.name}: cannot convert the weights of {name}: {reason}")
    if info.mismatched_keys:
        name, found, expected = next(iter(info.mismatched_keys))
        raise ModelError(
            f"{checkpoint.name}: {name} has shape {tuple(found)} in the checkpoint, but the "
            f"configuration asks for {tuple(expected)}"
        )
    if any(wanted(name) and name in info.missing_keys for name in _tied_names(model)):
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model.requires_grad_(False)
    _check_complete(model, checkpoint, wanted)


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
    """Stands for one checkpoint tensor in a state dict; indexing it reads it from the file."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint = checkpoint
        self._name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint.read_tensor(self._name)[index]


def _source_names(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    wanted: Callable[[str], bool],
    quantizer: HfQuantizer | None,
) -> list[str]:
    """Names of the checkpoint tensors that end up in wanted parameters.

    What headers alone show to be wrong is refused here, before anything is fetched or read.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    targets = model.state_dict()
    found = []
    filled = set()
    # The order is the one the loader uses: some renamings depend on what came before.
    for name in sorted(checkpoint.tensor_names(), key=dot_natural_key):
        target, converter = rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets and name in targets:
            target, converter = rename_source_key(name, [], [], prefix, targets)
        if target in targets and wanted(target):
            found.append(name)
            filled.add(target)
            expected = targets[target] if converter is None and quantizer is None else None
            _check_stored(checkpoint, name, target, expected)
    # One source may become several parameters, of which only the first is named above.
    if all(len(converter.target_patterns) == 1 for converter in converters):
        tied = _tied_names(model)
        _check_none_missing(
            checkpoint, [n for n in targets if wanted(n) and n not in filled and n not in tied]
        )
    return found


def _check_stored(
    checkpoint: Checkpoint, name: str, target: str, expected: torch.Tensor | None
) -> None:
    """Refuse a tensor that cannot become the parameter `target`, going by its header."""
    dtype = checkpoint.tensor_dtype(name)
    if expected is None:
        return
    if expected.is_floating_point() and not dtype.is_floating_point:
        raise ModelError(
            f"{checkpoint.name}: {name} is stored as {str(dtype).removeprefix('torch.')}, not as "
            "floating point; give the bfloat16 or float16 checkpoint"
        )
    shape = checkpoint.tensor_shape(name)
    if shape != tuple(expected.shape):
        raise ModelError(
            f"{checkpoint.name}: {target} has shape {shape} in the checkpoint, but the "
            f"configuration asks for {tuple(expected.shape)}; config.json and weights are not of "
            "one model"
        )


def _tied_names(model: PreTrainedModel) -> set[str]:
    tied = model.all_tied_weights_keys
    return {*tied.keys(), *tied.values()}


def _check_complete(
    model: PreTrainedModel, checkpoint: Checkpoint, wanted: Callable[[str], bool]
) -> None:
    _check_none_missing(
        checkpoint,
        [name for name, value in model.state_dict().items() if value.is_meta and wanted(name)],
    )


def _check_none_missing(checkpoint: Checkpoint, missing: list[str]) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{checkpoint.name} lacks weights its configuration asks for: "
            f"{', '.join(missing[:3])}{more}; download or copy the whole model folder again"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own progress bar, which would count tensors nobody asked for."""
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
