"""The per-family class names of Petals, for scripts that use them; any other family needs none.

Each loads through `AutoDistributedModelForCausalLM` and refuses a checkpoint of another type.
"""

from __future__ import annotations

from planetserve.client.hf.from_pretrained import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
)


class DistributedLlamaConfig(AutoDistributedConfig):
    """Configuration of a Llama model."""

    model_type = "llama"


class DistributedLlamaModel(AutoDistributedModel):
    """A Llama model without its head."""

    model_type = "llama"


class DistributedLlamaForCausalLM(AutoDistributedModelForCausalLM):
    """A Llama model."""

    model_type = "llama"


class DistributedFalconConfig(AutoDistributedConfig):
    """Configuration of a Falcon model."""

    model_type = "falcon"


class DistributedFalconModel(AutoDistributedModel):
    """A Falcon model without its head."""

    model_type = "falcon"


class DistributedFalconForCausalLM(AutoDistributedModelForCausalLM):
    """A Falcon model."""

    model_type = "falcon"


class DistributedBloomConfig(AutoDistributedConfig):
    """Configuration of a BLOOM model."""

    model_type = "bloom"


class DistributedBloomModel(AutoDistributedModel):
    """A BLOOM model without its head."""

    model_type = "bloom"


class DistributedBloomForCausalLM(AutoDistributedModelForCausalLM):
    """A BLOOM model."""

    model_type = "bloom"


class DistributedMixtralConfig(AutoDistributedConfig):
    """Configuration of a Mixtral model."""

    model_type = "mixtral"


class DistributedMixtralModel(AutoDistributedModel):
    """A Mixtral model without its head."""

    model_type = "mixtral"


class DistributedMixtralForCausalLM(AutoDistributedModelForCausalLM):
    """A Mixtral model."""

    model_type = "mixtral"
