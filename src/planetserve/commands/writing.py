"""Writes text with a swarm for a person who watches: streams, can be stopped, and tells the speed.

It is `generate()` with a streamer. A chat is one session, which keeps what the servers hold: each
turn continues the longest common beginning of the last text and the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging
from typing_extensions import override

from planetserve.client.hf.from_pretrained import AutoDistributedModelForCausalLM
from planetserve.client.session import InferenceSession
from planetserve.commands.text_options import TextConfig
from planetserve.config import ClientConfig
from planetserve.errors import ConfigError, ModelError, SessionLengthError
from planetserve.gateway.detokenize import TokenDecoder
from planetserve.model.file_sources import open_source
from planetserve.model.text_config import text_config
from planetserve.plan.report import short_name
from planetserve.types import Chain

_DEFAULT_NEW_TOKENS = 512
_LEAST_ROOM = 64
"""Tokens of an answer for which room is waited for, when servers have less at the moment."""
_LEAST_SESSION = 2048
"""Tokens that servers are asked to promise to a chat at first."""

Message = Mapping[str, str]
"""`role` and `content`, as chat templates take them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was written, and how fast."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    first_token_s: float
    """From the prompt to the first token; 0 if there was none."""
    tokens_per_s: float
    """Rate after the first token; 0 without a second one."""
    chain: Chain | None
    finish: str
    """`stop`: the model ended it; `length`: there was no more room; `interrupt`: the user did."""

    def report(self) -> str:
        """Speed and chain in one line."""
        words = f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'}"
        if self.tokens_per_s:
            words += f", {self.tokens_per_s:.1f} tokens/s"
        if self.num_tokens:
            words += f", first after {self.first_token_s:.2f} s"
        words += {"interrupt": ", stopped", "length": ", cut at its length"}.get(self.finish, "")
        if self.chain is not None:
            hops = (f"{hop.span} {short_name(hop.peer_id)}" for hop in self.chain)
            words += f"; blocks {', '.join(hops)}"
        return words


class Writer:
    """A model that writes. Made by `opened`; used by the main thread alone."""

    def __init__(self, model: Any, tokenizer: Any, config: TextConfig):
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise ModelError(
                "the model's tokenizer has no tokenizer.json; convert it with transformers, or use "
                "generate() from Python"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._decoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._config = config
        self._max_positions = getattr(text_config(model.config), "max_position_embeddings", None)
        self._session: InferenceSession | None = None
        if config.seed is not None:
            set_seed(config.seed)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text.

        Raises:
            ConfigError: there are none.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text)
        except (TypeError, ValueError) as error:  # lone surrogates
            raise ConfigError("the prompt cannot be tokenized: is it text?") from error
        if not ids:
            raise ConfigError("the prompt is empty")
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a chat, up to where the next answer begins.

        Raises:
            ConfigError: the model has no chat template, or that refuses the messages.
        """
        if not self.has_chat_template:
            raise ConfigError(
                "the model has no chat template; complete a text with `planetserve generate`"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # templates of checkpoints raise whatever they like
            raise ConfigError(f"the chat template refuses these messages: {error}") from error
        return ids

    def complete(self, ids: Sequence[int], show: Callable[[str], None]) -> Answer:
        """Write what follows a text of its own.

        Args:
            ids: the text.
            show: called with each piece of the answer.

        Raises:
            SessionLengthError: there is no room for more.
            PlanetServeError: the swarm cannot run it.
        """
        room = self._room(len(ids), len(ids) + _LEAST_ROOM)
        return self._generate(ids, ids, self._new_tokens(len(ids), room), show, session=None)

    def reply(self, messages: Sequence[Message], show: Callable[[str], None]) -> Answer:
        """Write the next answer of a chat, continuing what servers hold of it.

        Raises:
            ConfigError: as `encode_chat`.
            SessionLengthError: there is no room for more.
            PlanetServeError: the swarm cannot run it; the chat may go on.
        """
        ids = self.encode_chat(messages)
        session = self._session_for(len(ids))
        num_new = self._new_tokens(len(ids), session.max_length)
        return self._generate(ids, ids[_roll_back(session, ids) :], num_new, show, session)

    def forget(self) -> None:
        """End the chat's session; the servers' memory is free."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _session_for(self, num_tokens: int) -> InferenceSession:
        """The chat's session, with room for an answer to a text of so many tokens.

        A larger one takes its place when that is short and servers hold more. Servers compute the
        text again then, so there is room for some turns.
        """
        session = self._session
        held = 0 if session is None else session.max_length or 0
        wanted = num_tokens + (self._config.max_new_tokens or _DEFAULT_NEW_TOKENS)
        if session is not None and held >= wanted:
            return session
        least = num_tokens + (self._config.max_new_tokens or _LEAST_ROOM)
        length = max(_LEAST_SESSION, 2 * wanted)
        # What this session holds will be free.
        room = self._room(num_tokens, least if session is None else length)
        length = max(least, length if room is None else min(length, room))
        if session is not None and held >= length:
            return session
        self.forget()
        larger: InferenceSession = self._model.runtime.new_session(max_length=length)
        self._session = larger
        return larger

    def _room(self, num_tokens: int, least: int) -> int | None:
        """Tokens of text for which there is room, or will be for `least`; None if not known.

        Args:
            num_tokens: of the text so far.
            least: tokens to wait for if servers have less at the moment.

        Raises:
            SessionLengthError: the text alone is too long for the model.
        """
        held = self._model.runtime.longest_session(1, least)
        known = [value for value in (held, self._max_positions) if isinstance(value, int)]
        if isinstance(self._max_positions, int) and num_tokens >= self._max_positions:
            raise SessionLengthError(
                f"the text has {num_tokens} tokens; the model takes {self._max_positions}"
            )
        return min(known, default=None)

    def _new_tokens(self, num_tokens: int, room: int | None) -> int:
        """Most tokens of an answer to a text of so many tokens."""
        if self._config.max_new_tokens is not None:
            return self._config.max_new_tokens
        known = [limit for limit in (room, self._max_positions) if isinstance(limit, int)]
        return max(1, min([_DEFAULT_NEW_TOKENS, *(limit - num_tokens for limit in known)]))

    def _sampling(self) -> dict[str, Any]:
        """Keyword arguments of `generate()` that the user's settings stand for."""
        names = ("temperature", "top_p", "top_k")
        given = {
            name: value for name in names if (value := getattr(self._config, name)) is not None
        }
        if not given:
            return {}
        if given.get("temperature") == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**given, "do_sample": True}

    def _generate(
        self,
        ids: Sequence[int],
        new_ids: Sequence[int],
        max_new_tokens: int,
        show: Callable[[str], None],
        session: InferenceSession | None,
    ) -> Answer:
        stream, stop = _Stream(TokenDecoder(self._decoder, ids, True), show), _Stop()
        inputs = torch.tensor([new_ids], dtype=torch.int64, device=self._model.device)
        finish = "interrupt"
        with _interrupts_ask(stop, stream):
            try:
                self._model.generate(
                    inputs,
                    session=session,
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=inputs.device),
                    max_new_tokens=max_new_tokens,
                    streamer=stream,
                    stopping_criteria=StoppingCriteriaList([stop]),
                    **self._sampling(),
                )
                if not stop.is_asked:
                    finish = "length" if stream.num_tokens >= max_new_tokens else "stop"
            except KeyboardInterrupt:
                pass
        chain = None  # before the first token there may be none, and asking would wait for one
        if stream.num_tokens:
            chain = session.chain if session is not None else self._model.chain
        return Answer(
            "".join(stream.pieces), len(ids), stream.num_tokens, stream.first_token_s,
            stream.tokens_per_s, chain, finish,
        )  # fmt: skip


@contextlib.contextmanager
def opened(config: TextConfig) -> Iterator[Writer]:
    """The model's client half, joined to the swarm for the time of the block.

    Raises:
        PlanetServeError: the model cannot be loaded, or the swarm not joined.
    """
    transformers_logging.set_verbosity_error()
    options = {item.name: getattr(config, item.name) for item in dataclasses.fields(ClientConfig)}
    hub: dict[str, Any] = {"token": config.token, "cache_dir": config.cache_dir}
    path, revision = open_source(config.model, revision=config.revision, **hub).location
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, **hub)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config.model} has no tokenizer that can be read: {error}") from error
    with AutoDistributedModelForCausalLM.from_pretrained(
        config.model,
        config=ClientConfig(**{**options, "show_route": False}),
        torch_dtype=config.torch_dtype,
        device_map=config.device,
        revision=config.revision,
        **hub,
    ) as model:
        writer = Writer(model, tokenizer, config)
        try:
            yield writer
        finally:
            writer.forget()


def safe_text(text: str) -> str:
    """A model's text for a terminal: control characters spelled out, all others as they are."""
    if text.isprintable():
        return text
    return "".join(
        ascii(char)[1:-1] if char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs")
        else char
        for char in text
    )  # fmt: skip


def _roll_back(session: InferenceSession, ids: Sequence[int]) -> int:
    """Cut the session's text to what `ids` begins with; returns how many tokens that are."""
    held = session.output_ids
    if held is None:
        return 0
    old = held[0].tolist()
    pairs = zip(old, ids, strict=False)
    common = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(old), len(ids)))
    common = min(common, len(ids) - 1)  # the last token is always fed
    if common < len(old):
        # The last token of a text has not been processed: a rollback by none would leave it.
        session.position = max(0, min(common, session.position - (len(old) > session.position)))
        held = session.output_ids
        return 0 if held is None else held.shape[1]
    return common


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends the text after the token under way, once it is asked to."""

    def __init__(self) -> None:
        self.is_asked = False

    @override
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_asked, device=input_ids.device)


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Passes on the text of tokens as they come, and notes when that was."""

    def __init__(self, decoder: TokenDecoder, show: Callable[[str], None]):
        self.pieces: list[str] = []
        self.num_tokens = 0
        self._decoder = decoder
        self._show = show
        self._times_s: list[float] = []

    @property
    def first_token_s(self) -> float:
        return self._times_s[1] - self._times_s[0] if len(self._times_s) > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        if self.num_tokens < 2:
            return 0.0
        return (self.num_tokens - 1) / (self._times_s[-1] - self._times_s[1])

    @override
    def put(self, value: torch.Tensor) -> None:
        """The prompt, then new tokens."""
        self._times_s.append(time.perf_counter())
        if len(self._times_s) == 1:
            return
        for token in value.flatten().tolist():
            self.num_tokens += 1
            text = self._decoder.add(token)
            if text:
                self.pieces.append(text)
                self._show(text)

    @override
    def end(self) -> None:
        return


@contextlib.contextmanager
def _interrupts_ask(stop: _Stop, stream: _Stream) -> Iterator[None]:
    """In this block Ctrl-C asks the text to end with the token under way, which leaves what the
    servers hold of it in use; before the first token, and the second time, it ends it at once."""

    def on_signal(_number: int, _frame: object) -> None:
        if stop.is_asked or not stream.num_tokens:
            stop.is_asked = True
            raise KeyboardInterrupt
        stop.is_asked = True

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
