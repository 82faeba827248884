"""From the body of a request to what the text engine runs, with every limit checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from planetserve.gateway.errors import RequestError
from planetserve.gateway.protocol import SamplingRequest
from planetserve.gateway.sampling import SamplingParams
from planetserve.gateway.text import TextRequest

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_OTHER_PROCESSORS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "no_repeat_ngram_size",
    "sequence_bias",
    "suppress_tokens",
    "top_h",
    "typical_p",
    "watermarking_config",
)
_MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What requests may ask for, and what they get where they say nothing."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_logprobs: int
    eos_ids: frozenset[int]
    defaults: Mapping[str, Any]
    """Sampling parameters that the model's authors recommend."""

    def check_texts(self, num_prompts: int, n: int) -> None:
        """Refuse more texts than the gateway runs at once.

        Raises:
            RequestError: they are.
        """
        if num_prompts * n > self.max_num_seqs:
            raise RequestError(
                f"{num_prompts} prompts with {n} answers each are more than the {self.max_num_seqs}"
                " texts that this gateway generates at once; send several requests",
                "n" if n > 1 else "prompt",
            )

    def check_logprobs(self, number: int | None, param: str) -> None:
        """Refuse more log-probabilities than are shown.

        Raises:
            RequestError: they are.
        """
        if number is not None and number > self.max_logprobs:
            raise RequestError(f"{param} must be at most {self.max_logprobs}", param)

    def check_prompt(self, ids: Sequence[int], param: str) -> None:
        """Refuse an empty or too long prompt, and tokens that the model does not have.

        Raises:
            RequestError: it is one.
        """
        if not ids:
            raise RequestError("the prompt is empty", param)
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; this model takes {self.max_model_len} for "
                "prompt and answer together",
                param,
            )
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise RequestError(f"token ids must be from 0 to {self.vocab_size - 1}", param)


def sampling_defaults(generation_config: Any) -> dict[str, Any]:
    """The sampling parameters that a model's generation_config.json sets."""
    found = {name: getattr(generation_config, name, None) for name in _SAMPLING_DEFAULTS}
    return {name: value for name, value in found.items() if value is not None}


def ignored_processors(generation_config: Any) -> list[str]:
    """Settings of a model's generation_config.json that would change tokens and are not
    applied."""
    neutral: tuple[object, ...] = (None, 0, 1, [], {})
    return [
        name for name in _OTHER_PROCESSORS if getattr(generation_config, name, None) not in neutral
    ]


def sampling_params(body: SamplingRequest, limits: Limits, logprobs: int | None) -> SamplingParams:
    """The request's sampling parameters, those of the model where it gives none.

    Raises:
        RequestError: a token of `logit_bias` does not exist.
    """
    chosen = dict(limits.defaults)
    for name in _SAMPLING_DEFAULTS:
        value = getattr(body, name)
        if value is not None:
            chosen[name] = value
    chosen["top_k"] = max(chosen.get("top_k", 0), 0)
    return SamplingParams(
        **chosen,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=body.seed,
        logit_bias=_bias(body.logit_bias or {}, limits.vocab_size),
        logprobs=logprobs,
        min_tokens=body.min_tokens,
    )


def text_request(
    body: SamplingRequest,
    limits: Limits,
    sampling: SamplingParams,
    prompt_ids: Sequence[int],
    max_tokens: int,
    prompt_logprobs: int | None = None,
    grammar: LLMatcher | None = None,
) -> TextRequest:
    """One prompt of a request.

    Raises:
        RequestError: prompt and answer are longer than the model takes.
    """
    if len(prompt_ids) + max_tokens > limits.max_model_len:
        raise RequestError(
            f"{len(prompt_ids)} tokens of prompt and {max_tokens} of answer are more than the "
            f"{limits.max_model_len} that this model takes; lower max_tokens",
            "max_tokens",
        )
    if body.min_tokens and grammar is not None:
        raise RequestError("min_tokens cannot hold for what a grammar ends", "min_tokens")
    if body.min_tokens > max_tokens:
        raise RequestError("min_tokens must not be larger than max_tokens", "min_tokens")
    stop = body.stop or ()
    stop_ids = frozenset(body.stop_token_ids or ())
    if any(not 0 <= token < limits.vocab_size for token in stop_ids):
        raise RequestError(
            f"stop_token_ids must be from 0 to {limits.vocab_size - 1}", "stop_token_ids"
        )
    return TextRequest(
        prompt_ids=prompt_ids,
        sampling=sampling,
        max_tokens=max_tokens,
        n=body.n,
        eos_ids=frozenset() if body.ignore_eos else limits.eos_ids,
        stop_ids=stop_ids,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        reports_chain=body.stream_options is not None and body.stream_options.include_chain,
    )


def _bias(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= vocab_size:
            raise RequestError(
                f"logit_bias names tokens by ids from 0 to {vocab_size - 1}", "logit_bias"
            )
        bias[int(key)] = min(_MAX_BIAS, max(-_MAX_BIAS, value))
    return bias
