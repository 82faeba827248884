"""A model cut between all its blocks against the same model in one piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from planetserve.check.chain import LocalChain, local_logits
from planetserve.errors import ModelError, one_line
from planetserve.model.capabilities import has_recurrent_layers
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.loading import (
    build_on_meta,
    load_parameters,
    materialize_buffers,
    model_class,
)
from planetserve.model.text_config import text_config
from planetserve.types import BlockSpan

Progress = Callable[[str], None]

_TOLERANCE = 1e-4
"""Largest difference of logits in float32, or this part of their standard deviation if larger."""
_STATE_TOLERANCE = 1e-2
"""The same with recurrent layers, which compute many tokens in another way than one."""
_PROMPT_TOKENS = 9
_NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """How near a model that is cut comes to the model in one piece.

    Attributes:
        num_blocks: blocks that were tried.
        max_error: largest difference of any logit, with cuts between all blocks; None if such
            parts cannot be loaded.
        spread: standard deviation of the logits.
        tolerance: largest `max_error` that is rounding.
        equal_tokens: how many of `num_tokens` most likely tokens are the same.
        num_tokens: tokens compared.
        wrong_cuts: cut -> what is wrong with the model cut there alone; tried only if the cuts
            between all blocks give something else.
        is_local_own: whether transformers has loaded the model in one piece by itself; otherwise
            its class got the weights as servers read them.
    """

    num_blocks: int
    max_error: float | None
    spread: float
    tolerance: float
    equal_tokens: int
    num_tokens: int
    wrong_cuts: dict[int, str]
    is_local_own: bool

    @property
    def is_equal(self) -> bool:
        """Whether it gives the same result."""
        return self.max_error is not None and self.max_error <= self.tolerance

    @property
    def why_not_equal(self) -> str:
        """The difference in one line; empty if there is none."""
        if self.is_equal:
            return ""
        by = "" if self.max_error is None else f" by up to {self.max_error:.1e}"
        if not self.wrong_cuts:
            return f"with a cut between all blocks, its logits differ{by} from the local model's"
        cut, reason = next(iter(self.wrong_cuts.items()))
        more = f" and {len(self.wrong_cuts) - 1} more places" if len(self.wrong_cuts) > 1 else ""
        return f"cut before block {cut}{more}, {reason}"


def compare(checkpoint: Checkpoint, progress: Progress = lambda _: None) -> Comparison:
    """Cut a checkpoint between all blocks and, if that gives something else, at each place alone.

    Raises:
        ModelError: its family is refused, or weights are missing or damaged.
    """
    num_blocks = checkpoint.num_blocks
    pieces = _texts(checkpoint.config)
    progress("loading the model in one piece")
    local, is_own = load_in_one_piece(checkpoint)
    with torch.inference_mode():
        expected = local_logits(local, pieces)
    del local
    spread = float(expected[0].std())
    has_states = has_recurrent_layers(text_config(checkpoint.config))
    tolerance = (_STATE_TOLERANCE if has_states else _TOLERANCE) * max(1.0, spread)
    every = range(1, num_blocks)
    found, errors = _try_cuts(checkpoint, every, pieces, progress), {}
    if isinstance(found, str) or not _error(found, expected) <= tolerance:
        for cut in every:
            progress(f"comparing with a cut before block {cut} alone ({cut} of {num_blocks - 1})")
            alone = _try_cuts(checkpoint, [cut], pieces)
            if isinstance(alone, str):
                errors[cut] = alone
            elif not _error(alone, expected) <= tolerance:
                errors[cut] = f"logits differ by up to {_error(alone, expected):.1e}"
    if isinstance(found, str) and all(reason == found for reason in errors.values()):
        raise ModelError(found)
    equal = 0 if isinstance(found, str) else _num_equal(found, expected)
    return Comparison(
        num_blocks=num_blocks,
        max_error=None if isinstance(found, str) else _error(found, expected),
        spread=spread,
        tolerance=tolerance,
        equal_tokens=equal,
        num_tokens=sum(piece.shape[1] for piece in pieces),
        wrong_cuts=errors,
        is_local_own=is_own,
    )


def load_in_one_piece(checkpoint: Checkpoint) -> tuple[PreTrainedModel, bool]:
    """The whole model in float32, and whether transformers' own `from_pretrained` has made it.

    It does if all files are here and it needs no library to read them. Otherwise the model's class
    is filled with the weights that servers would read.

    Raises:
        ModelError: transformers cannot load it, or weights are missing or damaged.
    """
    config, dtype = copy.deepcopy(checkpoint.config), torch.float32
    files = set(checkpoint.tensor_names().values())
    is_whole = Checkpoint.open(checkpoint.path).num_blocks == checkpoint.num_blocks
    has_all = all((checkpoint.path / file).is_file() for file in files)
    if checkpoint.quantization() is None and is_whole and has_all:
        was_enabled = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model: PreTrainedModel = model_class(config).from_pretrained(
                checkpoint.path, config=config, dtype=dtype, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError) as error:
            reason = one_line(error, 300)
            raise ModelError(f"{checkpoint.name}: transformers cannot load it: {reason}") from error
        finally:
            if was_enabled:
                transformers_logging.enable_progress_bar()
        return model.eval(), True
    model = build_on_meta(checkpoint, dtype)
    load_parameters(model, checkpoint, lambda _: True, dtype, "cpu")
    materialize_buffers(model, "cpu")
    return model, False


def _texts(config: PretrainedConfig) -> list[torch.Tensor]:
    """A text of random tokens, as a prompt and single tokens, `[1, tokens]` each."""
    special = set(_special_tokens(config.to_dict()))
    usable = [n for n in range(3, text_config(config).vocab_size) if n not in special]
    generator = torch.Generator().manual_seed(7)
    count = _PROMPT_TOKENS + _NEW_TOKENS
    ids = torch.tensor(usable)[torch.randint(len(usable), (1, count), generator=generator)]
    return [ids[:, :_PROMPT_TOKENS], *ids[:, _PROMPT_TOKENS:].split(1, dim=1)]


def _special_tokens(values: Any, name: str = "") -> Iterator[int]:
    """Tokens that a configuration gives a meaning, such as those in the place of images."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _special_tokens(value, str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _special_tokens(value, name)
    elif isinstance(values, int) and "token" in name:
        yield values


def _try_cuts(
    checkpoint: Checkpoint,
    cuts: Sequence[int],
    pieces: Sequence[torch.Tensor],
    progress: Progress | None = None,
) -> list[torch.Tensor] | str:
    """Logits of the model with these cuts, or why there are none."""
    bounds = [0, *cuts, checkpoint.num_blocks]
    spans = [BlockSpan(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    hops = [(span, span) for span in spans]
    try:
        chain = LocalChain(checkpoint, hops, progress=progress)
        return [chain.logits(piece) for piece in pieces]
    except ModelError as error:
        return str(error)


def _error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    # `max` of Python forgets what is no number.
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())


def _num_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> int:
    pairs = zip(found, expected, strict=True)
    return sum(int((one.argmax(-1) == other.argmax(-1)).sum()) for one, other in pairs)
