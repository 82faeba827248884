"""The models of a gateway, and what the endpoints of each work with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.errors import ConfigError
from planetserve.gateway.constraints import Grammars
from planetserve.gateway.detokenize import special_ids
from planetserve.gateway.errors import RequestError
from planetserve.gateway.protocol import SamplingRequest
from planetserve.gateway.requests import Limits
from planetserve.gateway.response_templates import ResponseTemplates
from planetserve.gateway.text_engine import TextEngine
from planetserve.gateway.tokenizer_thread import Texts

_MAX_SHOWN_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the endpoints work with for one model."""

    names: Sequence[str]
    """What the model is called; the first one is in responses."""
    limits: Limits
    texts: Texts
    engine: TextEngine
    manager: ChainManager
    grammars: Grammars
    templates: ResponseTemplates | None
    """How answers are read; None: all text is content."""
    created_s: int = field(default_factory=lambda: int(time.time()))

    def describe(self, name: str) -> dict[str, Any]:
        """An entry of /v1/models."""
        return {
            "id": name,
            "object": "model",
            "created": self.created_s,
            "owned_by": "planetserve",
            "root": self.names[0],
            "parent": None,
            "max_model_len": self.limits.max_model_len,
        }

    def room(self, n: int, prompt_ids: Sequence[int]) -> int:
        """Tokens that an answer without a limit of its own may have."""
        held = self.engine.room(n, len(prompt_ids)) or self.limits.max_model_len
        return max(1, min(held, self.limits.max_model_len) - len(prompt_ids))

    def spell(self, body: SamplingRequest) -> Callable[[int], str]:
        """How log-probabilities of this request name tokens."""
        if body.return_tokens_as_token_ids:
            return lambda token: f"token_id:{token}"
        return lambda token: self.texts.decode([token])

    @cached_property
    def kept_ids(self) -> frozenset[int]:
        """Special tokens by which the parts of a message are told apart."""
        if self.templates is None:
            return frozenset()
        decoder = self.texts.decoder
        return frozenset(
            token
            for token in special_ids(decoder)
            if self.templates.needs(decoder.id_to_token(token) or "")
        )

    @cached_property
    def reasoning_id(self) -> int | None:
        """The token that begins reasoning, if one does."""
        opening = self.templates.reasoning_open if self.templates is not None else None
        return None if opening is None else self.texts.decoder.token_to_id(opening)


class Models:
    """The models of a gateway, by their names. The first one answers requests that name none.

    Raises:
        ConfigError: two have the same name.
    """

    def __init__(self, services: Sequence[Service]):
        self._named = [(name, service) for service in services for name in service.names]
        self.names = [name for name, _ in self._named]
        if len(set(self.names)) < len(self.names):
            raise ConfigError("two models are served by the same name; give NAME=MODEL")

    def find(self, name: str | None) -> tuple[Service, str]:
        """A model, and the name to answer with.

        Raises:
            RequestError: there is none of this name.
        """
        for known, service in self._named:
            if name in (known, None, ""):
                return service, known
        shown = (name or "")[:_MAX_SHOWN_CHARS]
        raise RequestError(f"the model {shown!r} does not exist here", "model", 404)

    def describe(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        return [service.describe(name) for name, service in self._named]
