"""Find the parts of a causal-LM model that PlanetServe cuts at: the layers and what surrounds them.

Works from structure alone (the list of layers is the `ModuleList` as long as the configuration
says), so a family needs no entry anywhere unless its structure misleads this search; `families`
holds those few lines. Nothing is changed here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from planetserve.errors import ModelError
from planetserve.model.families import family_of
from planetserve.model.text_config import text_config


@dataclass(frozen=True)
class Decoder:
    """Where a model keeps its layers. Modules are the model's own, not copies."""

    base: PreTrainedModel
    """The module whose `forward` loops over the layers."""
    base_path: str
    """Its dotted path in the model; empty if it is the model."""
    layers_attr: str
    """Attribute of `base` that holds the layers."""
    final_norm_attr: str
    """Attribute of `base` that is called right after the last layer."""

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(self.base, self.layers_attr)
        return layers

    @property
    def layers_path(self) -> str:
        """Dotted path of the layers in the model, for example `model.layers`."""
        return f"{self.base_path}.{self.layers_attr}" if self.base_path else self.layers_attr

    def layer_of(self, parameter_name: str) -> int | None:
        """Index of the layer a parameter belongs to, or None if it is outside the layers."""
        prefix = f"{self.layers_path}."
        if not parameter_name.startswith(prefix):
            return None
        return int(parameter_name[len(prefix) :].split(".", 1)[0])

    @functools.cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Parameters of `base.forward`, seen through the decorators around it."""
        return tuple(inspect.signature(self.base.forward).parameters)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments of `base.forward` as keywords."""
        return dict(zip(self.parameter_names, args, strict=False)) | dict(kwargs)


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Locate the decoder layers of `model`.

    Raises:
        ModelError: no list of layers, or more than one, has the length the configuration says; or
            no norm follows them, where a client takes the output.
    """
    text = text_config(model.config)
    root = _language_model(model, text)
    num_layers = text.num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and (not root or name.startswith(f"{root}."))
    ]
    outermost = min((name.count(".") for name in lists), default=0)
    candidates = [name for name in lists if name.count(".") == outermost]
    if len(candidates) != 1:
        raise ModelError(
            f"cannot tell the {num_layers} decoder layers of {type(model).__name__}: found "
            f"{', '.join(candidates) or 'no list of that length'}"
        )
    base_path, _, layers_attr = candidates[0].rpartition(".")
    base = model.get_submodule(base_path)
    if not isinstance(base, PreTrainedModel):
        raise ModelError(
            f"the layers of {type(model).__name__} are in {type(base).__name__}, which cannot run "
            "apart from the rest of it; such a family cannot be split into spans"
        )
    return Decoder(base, base_path, layers_attr, _final_norm(base, text.model_type))


def _language_model(model: PreTrainedModel, text: PretrainedConfig) -> str:
    """Path of the outermost part of a multimodal model that has the configuration `text`.

    Empty if that is the model itself.
    """
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is type(text)
    ]
    return min(paths, key=lambda path: path.count("."), default="")


def _final_norm(base: nn.Module, model_type: str) -> str:
    declared = family_of(model_type).final_norm
    if declared is not None:
        return declared
    norms = [
        name
        for name, child in base.named_children()
        if "norm" in type(child).__name__.lower() and "embed" not in name
    ]
    if not norms:
        raise ModelError(
            f"{type(base).__name__} as configured here has no norm after its last layer, "
            "where a client would take the output"
        )
    return norms[-1]
