"""`generate()` over remote layers: Hugging Face's own, with sessions for a cache.

`DistributedMixin` is put in front of the checkpoint's own class. It only decides which session a
call uses, keeps a session's token history for multi-turn use, and releases what a call opened.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch

from planetserve.client.remote_cache import RemoteCache
from planetserve.client.runtime import ClientRuntime
from planetserve.client.session import InferenceSession
from planetserve.errors import ConfigError, SessionLengthError
from planetserve.types import Chain

_opened: contextvars.ContextVar[list[RemoteCache] | None] = contextvars.ContextVar(
    "planetserve_opened", default=None
)


class SwarmMixin:
    """What every distributed model has besides the methods of its Hugging Face class."""

    runtime: ClientRuntime

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
        """Keep the servers' caches across several `generate()` calls.

        Args:
            max_length: tokens per row the session may hold, prompt and answers together.
        """
        with self.runtime.new_session(max_length=max_length) as session, self.use_session(session):
            yield session

    @contextlib.contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Make `session` the one that `generate()` continues in this block."""
        token = self.runtime.active.set(session)
        try:
            yield session
        finally:
            self.runtime.active.reset(token)

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
        session = session or self.runtime.active.get()
        if session is not None:
            return self._generate_in_session(session, inputs, *args, **kwargs)
        opened: list[RemoteCache] = []
        token = _opened.set(opened)
        result = None
        try:
            result = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
            return result
        finally:
            _opened.reset(token)
            kept = getattr(result, "past_key_values", None)
            for cache in opened:
                if cache is not kept:
                    cache.session.close()

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Hugging Face's hook: put a cache into `model_kwargs` unless one is there."""
        given = model_kwargs.get("past_key_values")
        if given is not None:
            if not isinstance(given, RemoteCache):
                raise ConfigError(
                    f"past_key_values of type {type(given).__name__} cannot be used by a "
                    "distributed model; leave it out"
                )
            # Hugging Face's own mark; without it the cache would not be returned.
            given._is_user_defined = True  # noqa: SLF001
            return
        if generation_config.use_cache is False:
            return
        cache = RemoteCache(self.runtime.new_session(lease_tokens=max_cache_length + 1))
        opened = _opened.get()
        if opened is not None:
            opened.append(cache)
        model_kwargs["past_key_values"] = cache

    def _generate_in_session(
        self, session: InferenceSession, inputs: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(session.cache, RemoteCache):
            session.cache = RemoteCache(session, keep_session=True)
        previous = session.output_ids
        num_previous = 0 if previous is None else previous.shape[1]
        if previous is not None:
            inputs = previous if inputs is None else torch.cat([previous, inputs], dim=1)
        if inputs is None or not inputs.shape[1]:
            raise ConfigError("the first generate() of a session needs input_ids")
        # After a rollback there may be nothing new: the last token is fed once more.
        session.cache.crop(min(0, inputs.shape[1] - 1 - session.cache.get_seq_length()))
        mask = _session_mask(session, inputs, kwargs.pop("attention_mask", None), num_previous)
        if session.max_length is not None and inputs.shape[1] > session.max_length:
            raise SessionLengthError(
                f"{inputs.shape[1]} tokens do not fit the session's "
                f"max_length={session.max_length}; open a session with a larger max_length"
            )
        if mask is not None:
            kwargs["attention_mask"] = mask
        result = super().generate(  # type: ignore[misc]
            inputs, *args, past_key_values=session.cache, **kwargs
        )
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        session.output_ids = sequences
        if mask is not None:
            new = sequences.shape[1] - mask.shape[1]
            session.attention_mask = torch.cat([mask, mask.new_ones(mask.shape[0], new)], dim=1)
        if isinstance(result, torch.Tensor):
            return sequences[:, num_previous:]
        result.sequences = sequences[:, num_previous:]
        return result


def _session_mask(
    session: InferenceSession,
    inputs: torch.Tensor,
    new_mask: torch.Tensor | None,
    num_previous: int,
) -> torch.Tensor | None:
    """The mask of the whole conversation from what was kept and what this call brings."""
    if new_mask is not None and new_mask.shape[1] == inputs.shape[1]:
        return new_mask
    old_mask = session.attention_mask
    if new_mask is None and old_mask is None:
        # Every token counts, also when one of them happens to be the padding token.
        return torch.ones_like(inputs)
    parts = [
        old_mask if old_mask is not None else torch.ones_like(inputs[:, :num_previous]),
        new_mask if new_mask is not None else torch.ones_like(inputs[:, num_previous:]),
    ]
    return torch.cat(parts, dim=1)
