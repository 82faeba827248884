"""A distributed model as a module among others: what copies and saves it, and what cannot.

Parameters of the client's half are plain ones. Only what would need the layers, or a second
connection to the swarm, is refused.
"""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any, ClassVar, NoReturn, Self

import torch
from typing_extensions import override

from planetserve.client.hf.remote_blocks import RemoteBlocks
from planetserve.client.runtime import ClientRuntime
from planetserve.errors import ConfigError

logger = logging.getLogger(__name__)


class RuntimeHandle:
    """Closes the runtime when the last of a model and its copies has been garbage-collected.

    The base model has none of its own: it lives as long as the model that it is part of.
    """

    def __init__(self, runtime: ClientRuntime):
        weakref.finalize(self, runtime.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class ModuleMixin:
    """Put in front of the class of a model, and of the base model within it."""

    remote_blocks: ClassVar[RemoteBlocks]
    forward_names: ClassVar[tuple[str, ...]]
    """Parameters of the whole model's `forward`, in order."""

    @property
    def rope_deltas(self) -> None:
        """What images add to the positions of the text after them: nothing, without images.

        Multimodal classes would keep that of the latest batch, whichever thread's it was.
        """

    @rope_deltas.setter
    def rope_deltas(self, deltas: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. `torch.compile` leaves a break here: a call to servers cannot be
        compiled, and around it are an embedding and a head."""
        return self._call_eagerly(args, kwargs)

    @torch.compiler.disable
    def _call_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            self._before_call(args, kwargs)
            return self._after_call(super().__call__(*args, **kwargs))  # type: ignore[misc]
        finally:
            self.remote_blocks.forget()

    def _before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to be called with these arguments."""

    def _after_call(self, output: Any) -> Any:
        """What the caller gets for an output."""
        return output

    def __copy__(self) -> Self:
        copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The local half is copied; both are clients through one place in the swarm."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        runtime = self.__dict__.get("runtime")
        memo[id(runtime)] = runtime
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @override
    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "a distributed model cannot be pickled: it is connected to a swarm. Save what you have "
            "changed with torch.save(model.state_dict(), FILE), and load the model where it is used"
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it would load a whole model, without a swarm.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("use AutoDistributedModelForCausalLM.from_pretrained to load a model")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the folder would look like a whole model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "save_pretrained would write a checkpoint without its blocks, which are on the "
            "servers; torch.save(model.state_dict(), FILE) keeps the client's half"
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `save_pretrained`.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "push_to_hub would publish a checkpoint without its blocks, which are on the servers"
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the blocks run elsewhere."""
        logger.warning("compile() has no effect on a distributed model: its blocks run on servers")
