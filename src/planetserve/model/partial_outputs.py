"""Outputs that a client half cannot give, unlike the whole model: inner states, attentions,
gradients.

States that the client has are returned; a request for others raises an error, where a model without
layers would return empty tuples, or no gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import ModelOutput
from typing_extensions import override

from planetserve.errors import ConfigError
from planetserve.model.text_config import text_config

logger = logging.getLogger(__name__)

_ON_SERVERS = {"output_attentions": "attention weights", "output_router_logits": "router logits"}
_NO_STATES = (
    "the hidden states between blocks stay on the servers: a distributed model gives "
    "hidden_states[0], which enters the first block, and hidden_states[-1], which leaves the last"
)
_NO_GRADIENTS = (
    "gradients cannot pass through the swarm: servers run no backward pass. What follows the "
    "blocks can be trained (the head if it is not tied, a classifier on the logits); call the "
    "model under torch.no_grad(), or give it inputs that need no gradient"
)

_IGNORED = -100
"""A label that Hugging Face's losses leave out."""


class HiddenStates(tuple[torch.Tensor, ...]):
    """As many states as the whole model returns, with None for those that the client does not
    have."""

    @override
    def __getitem__(self, index: Any) -> Any:
        picked = super().__getitem__(index)
        if picked is None or (isinstance(index, slice) and any(p is None for p in picked)):
            raise ConfigError(_NO_STATES)
        return picked

    @override
    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))


def switch_off(config: PretrainedConfig) -> None:
    """Switch off outputs that a checkpoint's configuration requests in every call and that the
    client cannot give."""
    for name, what in _ON_SERVERS.items():
        if getattr(config, name, False):
            logger.warning("%s of the model's configuration is ignored: %s stay on the servers",
                           name, what)  # fmt: skip
            setattr(config, name, False)


def setting(config: PretrainedConfig, name: str) -> Any:
    """A configuration's setting for the outputs of every call; None if it has none.

    Reading an attribute of a configuration takes three function calls in Python, for every token.
    """
    fields = vars(config)
    return fields.get(name, fields.get(f"_{name}"))  # a property keeps its value under the second


def take_wanted_states(config: PretrainedConfig, kwargs: dict[str, Any]) -> bool:
    """Whether a call of the base model wants hidden states, which its own code must not collect.

    Raises:
        ConfigError: it wants outputs that only servers have.
    """
    for name, what in _ON_SERVERS.items():
        if _wanted(config, kwargs, name):
            raise ConfigError(f"{what} stay on the servers; leave {name} out")
    wanted = _wanted(config, kwargs, "output_hidden_states")
    if wanted is None or wanted is False:
        return False
    if wanted is not True:
        last = text_config(config).num_hidden_layers
        chosen = [wanted] if isinstance(wanted, int) else list(wanted)
        if any(index not in (0, -1, last, -last - 1) for index in chosen):
            raise ConfigError(_NO_STATES)
    if kwargs.get("return_dict") is False:
        raise ConfigError("hidden states need return_dict=True")
    kwargs["output_hidden_states"] = False
    return True


def give_states(output: Any, entered_BTD: torch.Tensor, num_blocks: int) -> None:
    """Put the states that the client has into the base model's output."""
    between = (None,) * (num_blocks - 1)
    output["hidden_states"] = HiddenStates((entered_BTD, *between, output.last_hidden_state))


class _NoBackward(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, entered: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.detach()

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise ConfigError(_NO_GRADIENTS)


def without_backward(entered: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """`output` of a function without a backward pass; computing gradients of `entered` is an
    error."""
    result: torch.Tensor = _NoBackward.apply(entered, output)
    return result


def refuse_backward(output: Any) -> None:
    """Make the backward pass of a loss raise an error that says why it is not possible."""
    loss = output.get("loss") if isinstance(output, ModelOutput) else None
    if torch.is_grad_enabled() and loss is not None and not loss.requires_grad:
        output["loss"] = without_backward(torch.zeros((), requires_grad=True), loss)


def refuse_loss_from_padding(labels_BT: Any, mask_BT: Any) -> None:
    """Refuse a loss that includes predictions at padding, which the blocks do not compute.

    Raises:
        ConfigError: a label that counts follows a column that `mask_BT` leaves out.
    """
    if not isinstance(labels_BT, torch.Tensor) or not isinstance(mask_BT, torch.Tensor):
        return
    if mask_BT.dim() != 2 or mask_BT.shape != labels_BT.shape:
        return
    is_counted = labels_BT[:, 1:] != _IGNORED
    if bool((is_counted & (mask_BT[:, :-1].to(labels_BT.device) == 0)).any()):
        raise ConfigError(
            "the loss would count predictions made at padding, which are not computed; pad on the "
            f"right and give padding the label {_IGNORED}"
        )


def _wanted(config: PretrainedConfig, kwargs: dict[str, Any], name: str) -> Any:
    value = kwargs.get(name)
    return setting(config, name) if value is None else value
