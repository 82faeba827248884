"""Choosing tokens for the rows of a batch, each row with parameters and a seed of its own.

Definitions: frequency and presence penalty as OpenAI publishes them, over the tokens generated so
far; repetition penalty as transformers has it, over prompt and generated tokens; the order of
transformers (bias and penalties, temperature, top-k, top-p, min-p); log-probabilities of the
model's own logits, before any of these, as vLLM returns them. Temperature 0 takes the largest
logit.

A token is drawn by one uniform number per row against the cumulative distribution, so a row's
tokens depend on its own seed and not on the rows that it shares a batch with.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from planetserve.gateway.constraints import Constraint

_GREEDY_BELOW = 1e-5
"""Temperatures below it count as 0, as in vLLM."""
_CANDIDATES = 1024
"""Tokens that are sorted first for top-p; nearly always enough."""
_LEAST_LOGPROB = -9999.0
"""Shown for tokens of no probability: JSON has no infinity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one text are chosen. Values have been checked."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """How many of the most likely tokens to report besides the chosen one; None: nothing."""
    min_tokens: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < _GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token, and the most likely ones at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen for one row."""

    token: int
    logprob: TokenLogprob | None = None
    forced: tuple[int, ...] = ()
    """Tokens that the row's grammar wants next, chosen as well."""
    is_finite: bool = True
    """Whether the logits were numbers; otherwise nothing was chosen."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of them."""
        return (self.token, *self.forced)


class _SeenTokens:
    """Distinct tokens of one text, and how often each has been generated."""

    def __init__(self, prompt_ids: Sequence[int]):
        distinct = list(dict.fromkeys(prompt_ids))
        self._places = {token: place for place, token in enumerate(distinct)}
        self._ids = torch.tensor(distinct, dtype=torch.int64)
        self._counts = torch.zeros(len(distinct))

    @property
    def ids(self) -> torch.Tensor:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> torch.Tensor:
        """As many as `ids`; 0 for a token of the prompt only."""
        return self._counts[: len(self._places)]

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            room = max(64, len(self._ids))
            self._ids = torch.cat([self._ids, torch.zeros(room, dtype=torch.int64)])
            self._counts = torch.cat([self._counts, torch.zeros(room)])
        self._ids[place] = token
        self._counts[place] += 1


class RowSampling:
    """The state of one text's sampling.

    Args:
        params: the request's.
        prompt_ids: for the repetition penalty.
        stop_ids: tokens that end the text, kept out for the first `min_tokens`.
        constraint: what the text must follow.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: frozenset[int],
        constraint: Constraint | None = None,
    ):
        self.params = params
        self.constraint = constraint
        self._rng = random.Random(params.seed)
        self.num_sampled = 0
        self.bias: tuple[torch.Tensor, torch.Tensor] | None = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            self.bias = torch.tensor(ids), torch.tensor(values, dtype=torch.float32)
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        has_penalty = (
            params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        )
        self.seen = _SeenTokens(prompt_ids) if has_penalty else None

    @property
    def forbidden(self) -> torch.Tensor | None:
        """Ids that must not be chosen now."""
        return self._stop_ids if self.num_sampled < self.params.min_tokens else None

    @property
    def changes_logits(self) -> bool:
        """Whether something comes before the temperature."""
        return any(
            one is not None for one in (self.bias, self.seen, self.forbidden, self.constraint)
        )

    def draw(self) -> float:
        """A uniform number in `[0, 1)`."""
        return self._rng.random()

    def take(self, token: int) -> tuple[int, ...]:
        """Note what was chosen; returns the tokens that must follow, noted as well."""
        self._note(token)
        # A forced token has no log-probability to show.
        if self.constraint is None or self.params.logprobs is not None:
            return ()
        forced = self.constraint.forced()
        for one in forced:
            self._note(one)
        return forced

    def _note(self, token: int) -> None:
        self.num_sampled += 1
        if self.seen is not None:
            self.seen.add(token)
        if self.constraint is not None:
            self.constraint.take(token)


def sample(logits_NV: torch.Tensor, rows: Sequence[RowSampling]) -> list[Sampled]:
    """Choose the next token of every row from its float32 logits, and note it in the row."""
    logprobs = _chosen_logprobs(logits_NV, rows)
    changed = [index for index, row in enumerate(rows) if row.changes_logits]
    if changed:
        logits_NV = logits_NV.clone()
        for index in changed:
            _change(logits_NV[index], rows[index])
    best_N, tokens_N = logits_NV.max(dim=-1)
    bad_N = ~(best_N < torch.inf)  # NaN too
    if bool(bad_N.any()):
        # Of this text alone: the others have done nothing to it.
        logits_NV = logits_NV.masked_fill(bad_N[:, None], 0)
        tokens_N[bad_N] = 0
    bad: list[bool] = bad_N.tolist()
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        chosen = logits_NV if len(drawn) == len(rows) else logits_NV[drawn]
        tokens_N[drawn] = _draw(chosen, [rows[index] for index in drawn])
    tokens: list[int] = tokens_N.tolist()
    sampled = []
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        forced = () if bad[index] else row.take(token)
        of = logprobs.get(index)
        logprob = None if of is None else of.at(token)
        sampled.append(Sampled(token, logprob, forced, is_finite=not bad[index]))
    return sampled


def prompt_logprobs(
    logits_TV: torch.Tensor, next_ids: Sequence[int], num_top: int
) -> list[TokenLogprob]:
    """The log-probability of each token that follows, and the most likely ones."""
    found_TV = torch.log_softmax(logits_TV, dim=-1)
    return [
        _RowLogprobs(row_V, num_top).at(token)
        for row_V, token in zip(found_TV, next_ids, strict=True)
    ]


class _RowLogprobs:
    """All log-probabilities at one place."""

    def __init__(self, logprobs_V: torch.Tensor, num_top: int):
        self._logprobs_V = logprobs_V
        self._num_top = min(num_top, len(logprobs_V))

    def at(self, token: int) -> TokenLogprob:
        values, ids = self._logprobs_V.topk(self._num_top)
        top = zip(ids.tolist(), map(_shown, values.tolist()), strict=True)
        return TokenLogprob(token, _shown(float(self._logprobs_V[token])), tuple(top))


def _shown(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _chosen_logprobs(
    logits_NV: torch.Tensor, rows: Sequence[RowSampling]
) -> dict[int, _RowLogprobs]:
    wanted = [(index, row.params.logprobs) for index, row in enumerate(rows)]
    asked = [(index, num_top) for index, num_top in wanted if num_top is not None]
    if not asked:
        return {}
    found = torch.log_softmax(logits_NV[[index for index, _ in asked]], dim=-1)
    return {
        index: _RowLogprobs(row_V, num_top)
        for (index, num_top), row_V in zip(asked, found, strict=True)
    }


def _change(logits_V: torch.Tensor, row: RowSampling) -> None:
    """Bias, forbidden tokens, penalties and grammar, in place."""
    params = row.params
    if row.bias is not None:
        ids, values = row.bias
        logits_V[ids] += values
    if row.forbidden is not None:
        logits_V[row.forbidden] = -torch.inf
    if row.seen is not None:
        ids, counts = row.seen.ids, row.seen.counts
        found, penalty = logits_V[ids], params.repetition_penalty
        found = torch.where(found > 0, found / penalty, found * penalty)
        found -= params.frequency_penalty * counts
        found -= params.presence_penalty * (counts > 0)
        logits_V[ids] = found
    if row.constraint is not None:
        row.constraint.allow(logits_V)


def _draw(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """One token for each row, by its temperature and limits."""
    temperature_R = torch.tensor([row.params.temperature for row in rows])
    scores_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R[:, None]
    draws_R = torch.tensor([row.draw() for row in rows], dtype=torch.float64)
    tokens_R = torch.empty(len(rows), dtype=torch.int64)
    cut = [index for index, row in enumerate(rows) if row.params.top_k or row.params.top_p < 1]
    whole = sorted(set(range(len(rows))) - set(cut))
    if whole:
        probs_RV = torch.softmax(scores_RV[whole], dim=-1)
        least = _column(rows, whole, "min_p")
        if bool(least.any()):
            probs_RV[probs_RV < least * probs_RV.amax(dim=-1, keepdim=True)] = 0
        tokens_R[whole] = _pick(probs_RV, draws_R[whole])
    if cut:
        tokens_R[cut] = _draw_cut(scores_RV[cut], [rows[i] for i in cut], draws_R[cut])
    return tokens_R


def _draw_cut(
    scores_RV: torch.Tensor, rows: Sequence[RowSampling], draws_R: torch.Tensor
) -> torch.Tensor:
    """For rows with top-k or top-p: only the most likely tokens are sorted, all of them where these
    have not mass enough."""
    vocab = scores_RV.shape[1]
    every = range(len(rows))
    top_k_R = torch.tensor([min(row.params.top_k or vocab, vocab) for row in rows])
    width = min(vocab, max(_CANDIDATES, *(row.params.top_k for row in rows)))
    top_p = _column(rows, every, "top_p")
    while True:
        values, ids = scores_RV.topk(width)
        keep = torch.arange(width) < top_k_R[:, None]
        # The mass that top-p is a share of is what top-k has left.
        mass_R = torch.where(
            top_k_R < vocab,
            values.masked_fill(~keep, -torch.inf).logsumexp(dim=-1),
            scores_RV.logsumexp(dim=-1),
        )
        probs = torch.exp(values - mass_R[:, None]) * keep
        sums = probs.cumsum(dim=-1)
        enough = (sums[:, -1:] >= top_p) | (top_k_R[:, None] <= width)
        if width == vocab or bool(enough.all()):
            break
        width = vocab
    # The most likely one stays, however small top_p is.
    probs[:, 1:][(sums - probs)[:, 1:] >= top_p] = 0
    probs[probs < _column(rows, every, "min_p") * probs[:, :1]] = 0
    return ids.gather(1, _pick(probs, draws_R)[:, None])[:, 0]


def _column(rows: Sequence[RowSampling], chosen: Sequence[int], name: str) -> torch.Tensor:
    return torch.tensor([getattr(rows[index].params, name) for index in chosen])[:, None]


def _pick(probs_RV: torch.Tensor, draws_R: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulative sum of each row first passes its draw."""
    sums_RV = probs_RV.cumsum(dim=-1, dtype=torch.float64)
    totals_R = sums_RV[:, -1]
    # A draw that rounds up to the total would point behind the last token.
    aims_R = torch.minimum(draws_R * totals_R, torch.nextafter(totals_R, totals_R.new_zeros(())))
    return torch.searchsorted(sums_RV, aims_R[:, None], right=True)[:, 0]
