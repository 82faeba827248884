"""One `generate()` inside a session, which continues the session's text.

Hugging Face gets the whole text each time, as it would locally, and a cache that already holds the
part that the servers have. So every decoding method gives the same result as for that text without
a session, whatever the turns before have left on the servers. A turn that fails does not change
the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from planetserve.client.hf.remote_cache import RemoteCache
from planetserve.client.session import InferenceSession
from planetserve.errors import ConfigError, SessionClosed, SessionLengthError

_KEPT_BY_THE_SESSION = (
    "past_key_values", "inputs_embeds", "position_ids", "token_type_ids", "cache_position",
    "custom_generate", "token_healing",
)  # fmt: skip
_LENGTHS = ("max_length", "max_new_tokens")


def asks_for_length(
    args: Sequence[Any], kwargs: Mapping[str, Any], defaults: GenerationConfig
) -> bool:
    """Whether the caller of `generate()` set a maximum length."""
    if any(kwargs.get(name) is not None for name in _LENGTHS):
        return True
    given = _given_config(args, kwargs)
    return given is not None and any(
        getattr(given, name) not in (None, getattr(defaults, name)) for name in _LENGTHS
    )


def refuse_what_needs_layers(kwargs: Mapping[str, Any]) -> None:
    """Refuse decoding methods that need the layers on this machine.

    Raises:
        ConfigError: the arguments ask for such a method.
    """
    if kwargs.get("assistant_early_exit") is not None:
        raise ConfigError(
            "assistant_early_exit needs the model's layers on this machine; pass assistant_model "
            "or prompt_lookup_num_tokens"
        )
    if kwargs.get("cache_implementation") == "paged":
        raise ConfigError(
            "cache_implementation='paged' needs the model's layers on this machine; leave it out: "
            "servers keep all keys and values in pages"
        )


class Turn:
    """One turn. Call `begin`, `prepare`, Hugging Face's `generate()` with `cache_for`, `finish`."""

    def __init__(self, session: InferenceSession):
        self.session = session
        self._ids = torch.empty(0, 0, dtype=torch.int64)
        self._mask = self._ids
        self._num_previous = 0
        self._config: Any = None
        self._is_mask_given = False

    @classmethod
    @contextlib.contextmanager
    def begin(cls, session: InferenceSession) -> Iterator[Turn]:
        """Lock the session for one turn.

        Raises:
            ConfigError: another turn uses it.
            SessionClosed: the session is closed.
        """
        if session.closed:
            raise SessionClosed("this inference session is closed; open another")
        if not session.turn.acquire(blocking=False):
            raise ConfigError(
                "this session is generating already; wait for that, or open another session"
            )
        try:
            yield cls(session)
        finally:
            session.turn.release()

    def prepare(
        self,
        inputs: torch.Tensor | None,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        merge: Callable[..., tuple[Any, dict[str, Any]]],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns the whole text, and the keyword arguments with its mask.

        Args:
            inputs: the new tokens.
            args: the other positional arguments of `generate()`.
            kwargs: its keyword arguments.
            merge: merges all sources of generation settings into one configuration.

        Raises:
            ConfigError: an argument does not fit a session or its text.
            SessionLengthError: the text is longer than the session may be.
        """
        others = {name: value for name, value in kwargs.items() if name != "generation_config"}
        self._config, _ = merge(_given_config(args, kwargs), **others)
        for name in _KEPT_BY_THE_SESSION:
            if kwargs.get(name) is not None or getattr(self._config, name, None):
                raise ConfigError(
                    f"{name} cannot be used inside a session, which keeps the text itself; leave "
                    "it out, or generate without a session"
                )
        if self.session.lengths and self.session.cache is None:
            raise ConfigError(
                "this session was given hidden states by step(), which generate() cannot go on "
                "with; open another session"
            )
        previous = self.session.conversation.output_ids
        new = _new_ids(inputs, previous)
        self._ids = new if previous is None else torch.cat([previous.to(new.device), new], dim=1)
        if not self._ids.shape[1]:
            raise ConfigError("the first generate() of a session needs input_ids")
        self._num_previous = self._ids.shape[1] - new.shape[1]
        self._mask = self._whole_mask(new, kwargs.get("attention_mask"))
        longest = int(self._mask.sum(dim=1).max())
        if self.session.max_length is not None and longest > self.session.max_length:
            raise SessionLengthError(
                f"{longest} tokens do not fit the session's max_length={self.session.max_length}; "
                "open a session with a larger max_length"
            )
        return self._ids, {**kwargs, "attention_mask": self._mask}

    def longest(self) -> int | None:
        """Maximum columns of the session; None if only the servers limit it."""
        if self.session.max_length is None:
            return None
        padding = self._mask.shape[1] - int(self._mask.sum(dim=1).max())
        return self.session.max_length + padding

    def cache_for(
        self, num_rows: int, config: Any, mode: GenerationMode, max_cache_length: int
    ) -> RemoteCache:
        """The cache for `num_rows` rows, with the part of the text that the servers hold."""
        cache = self.session.cache
        if not isinstance(cache, RemoteCache) or cache.num_rows not in (0, num_rows):
            # Servers promise room for so many rows. Starting over computes equal rows once.
            self.session.restart()
            cache = RemoteCache(self.session, keep_session=True, keep_ids=True)
            self.session.cache = cache
        self.session.expect(max_cache_length + 1)
        copies = num_rows // self._ids.shape[0]
        cache.keep_common(
            self._ids.repeat_interleave(copies, dim=0), self._mask.repeat_interleave(copies, dim=0)
        )
        if config.output_hidden_states:
            cache.reset()  # those of all tokens are asked for
        if mode == GenerationMode.ASSISTED_GENERATION:
            cache.feed_again()
        # Hugging Face's own mark; without it the cache would not be kept.
        cache._is_user_defined = True  # noqa: SLF001
        return cache

    def finish(self, result: Any) -> Any:
        """Store the text, and return what `generate()` returns in a session: the new tokens."""
        is_plain = isinstance(result, torch.Tensor)
        sequences = result if is_plain else result.sequences
        copies = sequences.shape[0] // self._ids.shape[0]
        mask = self._mask.repeat_interleave(copies, dim=0)
        answers = sequences[:, self._ids.shape[1] :]
        self.session.conversation.store(
            sequences, torch.cat([mask, self._answer_mask(answers)], dim=1), self._is_mask_given
        )
        new = sequences[:, self._num_previous :]
        if is_plain:
            return new
        result.sequences = new
        return result

    def _whole_mask(self, new: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """The mask of the whole text: the previous mask, and the given or derived one for the new
        tokens."""
        conversation = self.session.conversation
        self._is_mask_given = conversation.is_mask_given or given is not None
        if given is not None:
            if given.dim() == 2 and given.shape[0] == 1:
                given = given.expand(new.shape[0], -1)
            if given.shape == self._ids.shape:
                return given
            if given.shape != new.shape:
                raise ConfigError(
                    f"attention_mask of shape {tuple(given.shape)} fits neither the new tokens "
                    f"{tuple(new.shape)} nor the whole text {tuple(self._ids.shape)}"
                )
        elif self._is_mask_given or not self._is_pad_known(new):
            given = torch.ones_like(new)
        else:
            given = new.ne(self._pad).long()
        old = conversation.attention_mask
        return given if old is None else torch.cat([old.to(given), given], dim=1)

    def _answer_mask(self, answers: torch.Tensor) -> torch.Tensor:
        """The mask of answers; padding after the end of a row is not part of its text."""
        mask = torch.ones_like(answers, dtype=self._mask.dtype)
        if self._is_mask_given or not self._is_pad_known(answers):
            return mask
        ends = torch.isin(answers, torch.tensor(_as_list(self._config.eos_token_id)).to(answers))
        has_ended = ends.long().cumsum(dim=1) - ends.long() > 0
        return mask.masked_fill(has_ended & answers.eq(self._pad), 0)

    @property
    def _pad(self) -> int:
        return int(self._config.pad_token_id)

    def _is_pad_known(self, ids: torch.Tensor) -> bool:
        """Whether padding can be told from text without a mask, by the rule of Hugging Face."""
        pad = self._config.pad_token_id
        if pad is None or not isinstance(pad, int) or not bool(ids.eq(pad).any()):
            return False
        return pad not in _as_list(self._config.eos_token_id)


def _new_ids(inputs: torch.Tensor | None, previous: torch.Tensor | None) -> torch.Tensor:
    """The new tokens of every row of the text."""
    if inputs is None:
        return torch.empty(1, 0, dtype=torch.int64) if previous is None else previous[:, :0]
    if not isinstance(inputs, torch.Tensor) or inputs.dim() != 2:
        raise ConfigError("input_ids must be a 2D tensor [batch, tokens]")
    if previous is None or len(inputs) == len(previous):
        return inputs
    if len(inputs) != 1:
        raise ConfigError(
            f"this session holds {len(previous)} texts, got new tokens for {len(inputs)}; give one "
            "row for each text, or one row for all"
        )
    return inputs.expand(len(previous), -1)


def _given_config(args: Sequence[Any], kwargs: Mapping[str, Any]) -> GenerationConfig | None:
    config = args[0] if args else kwargs.get("generation_config")
    return config if isinstance(config, GenerationConfig) else None


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(token) for token in ids]
