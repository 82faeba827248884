"""The few facts about model families that cannot be read off their structure, as data.

Most families need no entry: both ends run the family's own Hugging Face code. An entry either
corrects a guess of `decoder.find_decoder` or gives the reason why a family is refused. Which
families are tested is listed in `planetserve.testing.checkpoints` and in docs/families.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Declared facts about one `model_type`; the defaults say "derive it"."""

    refused: str | None = None
    """Why the family cannot be served, as the end of a sentence."""
    final_norm: str | None = None
    """Attribute of the base model that is called right after the layers."""
    norm_calls_before_layers: int = 0
    """How often the base model calls that same module before its layers."""
    needs_masks: bool = False
    """Whether the base model fails when transformers builds no attention mask for it, so that a
    client half has to build one although no layer will read it."""


_RECURRENT = "its layers keep a recurrent state, which cannot be paged or rolled back"

FAMILIES: Mapping[str, Family] = {
    "nanochat": Family(norm_calls_before_layers=1),
    "mpt": Family(needs_masks=True),
    "openai-gpt": Family(refused="transformers runs it without a cache of keys and values"),
    "rwkv": Family(refused=_RECURRENT),
    "xlstm": Family(refused=_RECURRENT),
}


def family_of(model_type: str) -> Family:
    """The declared facts of a family; all defaults if it has no entry."""
    return FAMILIES.get(model_type, Family())
