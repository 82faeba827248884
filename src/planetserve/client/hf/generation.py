"""`generate()` over remote layers: Hugging Face's own, with sessions for a cache.

`DistributedMixin` is put in front of the checkpoint's own class. It only decides which cache a call
uses, and releases what a call opened. Inside a session a call is a turn (`turn.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

import torch

from planetserve.client.hf.remote_blocks import RIGHT_PADDED, RemoteBlocks
from planetserve.client.hf.remote_cache import RemoteCache, usable_cache
from planetserve.client.hf.turn import Turn, asks_for_length, refuse_what_needs_layers
from planetserve.client.runtime import ClientRuntime
from planetserve.client.session import InferenceSession
from planetserve.errors import ConfigError
from planetserve.model.partial_outputs import refuse_backward, refuse_loss_from_padding, setting
from planetserve.types import Chain

logger = logging.getLogger(__name__)

_LEAST_ROOM = 256
"""Tokens of an answer for which room is waited for, when servers have less at the moment."""


@dataclass(slots=True)
class _Running:
    """One `generate()` under way in this context."""

    turn: Turn | None
    may_shorten: bool
    """Whether the length was not asked for, but is a default."""
    opened: list[RemoteCache] = field(default_factory=list)
    max_length: int | None = None
    """Columns at which the text stops because the servers hold no more."""


_running: contextvars.ContextVar[_Running | None] = contextvars.ContextVar(
    "planetserve_running", default=None
)


class SwarmMixin:
    """What every distributed model has besides the methods of its Hugging Face class."""

    runtime: ClientRuntime
    remote_blocks: ClassVar[RemoteBlocks]
    forward_names: ClassVar[tuple[str, ...]]
    config: Any

    @property
    def chain(self) -> Chain:
        """The chain in use: that of the latest session, or the one a session would get now."""
        return self.runtime.current_chain()

    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write what a chain would be planned on now to a file, for `planetserve plan --snapshot`.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.runtime.snapshot().save(os.fspath(path))

    @property
    def active_session(self) -> InferenceSession | None:
        """The session of the `with model.inference_session(...)` block around this call."""
        return self.runtime.active.get()

    @contextlib.contextmanager
    def inference_session(self, max_length: int | None = None) -> Iterator[InferenceSession]:
        """Keep the servers' caches across several `generate()` calls, also those of threads that
        are started inside (not of workers of a pool: give them `session=`).

        Args:
            max_length: tokens per row the session may hold, prompt and answers together.
        """
        with self.runtime.new_session(max_length=max_length) as session, self.use_session(session):
            yield session

    @contextlib.contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Make `session` the one that `generate()` continues in this block; with None, each call
        makes a text of its own."""
        if session is not None:
            self._check_own(session)
        token = self.runtime.active.set(session)
        try:
            yield session
        finally:
            self.runtime.active.reset(token)

    def _check_own(self, session: object) -> None:
        if not isinstance(session, InferenceSession):
            raise ConfigError(
                "session must be an open session: `with model.inference_session() as session:`"
            )
        if not self.runtime.owns(session):
            raise ConfigError("this session belongs to another model; open one with this model")

    def _before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.runtime.check_process()
        given = dict(zip(self.forward_names, args, strict=False)) | kwargs
        labels = given.get("labels")
        if labels is not None:
            refuse_loss_from_padding(labels, given.get("attention_mask"))
        wants_states = given.get("output_hidden_states") or setting(
            self.config, "output_hidden_states"
        )
        self.remote_blocks.on_outer_call(
            given, 0 if wants_states else given.get("logits_to_keep", 0)
        )

    def _after_call(self, output: Any) -> Any:
        refuse_backward(output)
        return output

    def close(self) -> None:
        """Close every session, leave the swarm, and stop the background thread. Idempotent."""
        self.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class DistributedMixin(SwarmMixin):
    """`generate()` for distributed models with a head."""

    generation_config: Any
    _prepare_generation_config: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        session: InferenceSession | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Hugging Face's `generate()`.

        Inside `inference_session`, or with `session=`, a second call continues the first:
        `inputs` are the *new* tokens only (or None to go on), and the new tokens are returned.

        Raises:
            SessionLengthError: the session's `max_length` leaves no room.
            PlanetServeError: no chain could run a step within the bounded retries.
        """
        if inputs is None and "input_ids" in kwargs:
            inputs = kwargs.pop("input_ids")
        refuse_what_needs_layers(kwargs)
        if session is None:
            session = self._active_session()
        else:
            self._check_own(session)
        if session is None:
            return self._generate(None, inputs, *args, **kwargs)
        with Turn.begin(session) as turn, self.use_session(None):
            inputs, kwargs = turn.prepare(inputs, args, kwargs, self._prepare_generation_config)
            result = self._generate(turn, inputs, *args, **kwargs)
            return turn.finish(result)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: continuous batching manages the keys and values of layers that are here."""
        raise ConfigError(
            "continuous batching needs the model's layers on this machine; call generate(), also "
            "from several threads: the servers batch what comes at the same time"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _active_session(self) -> InferenceSession | None:
        active = self.runtime.active
        session = active.get()
        if session is None and active.may_be_missed():
            logger.warning(
                "generate() in thread %s makes a text of its own, although a session is open in "
                "another thread; to go on with that one, pass session=...",
                threading.current_thread().name,
            )
        return session

    def _generate(
        self, turn: Turn | None, inputs: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        running = _Running(turn, not asks_for_length(args, kwargs, self.generation_config))
        token = _running.set(running)
        result = None
        try:
            result = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
            return result
        finally:
            _running.reset(token)
            kept = getattr(result, "past_key_values", None)
            for cache in running.opened:
                if cache is kept:
                    cache.is_kept = True
                    self.runtime.keep(cache.session)
                else:
                    cache.session.close()
            if running.max_length is not None:
                texts = getattr(result, "sequences", result)
                if isinstance(texts, torch.Tensor) and texts.shape[1] == running.max_length:
                    logger.warning(
                        "the text stops at %d tokens, since the session or its servers hold no "
                        "more; its default length would be larger",
                        running.max_length,
                    )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Hugging Face's hook: put a cache into `model_kwargs` unless one is there."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1:].all()):
            raise ConfigError(RIGHT_PADDED)
        given = model_kwargs.get("past_key_values")
        if given is not None or generation_config.use_cache is False:
            if given is not None:
                if generation_config.cache_implementation is not None:
                    raise ConfigError("give either past_key_values or cache_implementation")
                given = usable_cache(given, self.runtime.new_session)
                # Hugging Face's own mark; without it the cache would not be returned.
                given._is_user_defined = True  # noqa: SLF001
            return
        if generation_config.cache_implementation == "quantized":
            raise ConfigError(
                "cache_implementation='quantized' is not possible: servers keep keys and values in "
                "their own dtype; leave it out"
            )
        running = _running.get() or _Running(None, may_shorten=False)
        turn = running.turn
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        if running.may_shorten:
            columns = getattr(generation_config, "_mask_length", 0)
            if mask is not None:
                columns = mask.shape[1]
            limit = None if turn is None else turn.longest()
            if limit is None:
                limit = self.runtime.longest_session(rows, columns + _LEAST_ROOM)
            if limit is not None and columns < limit <= max_cache_length:
                generation_config.max_length = running.max_length = limit
                max_cache_length = limit - 1
        if turn is not None:
            cache = turn.cache_for(rows, generation_config, generation_mode, max_cache_length)
        else:
            cache = RemoteCache(self.runtime.new_session(lease_tokens=max_cache_length + 1))
            running.opened.append(cache)
        model_kwargs["past_key_values"] = cache
