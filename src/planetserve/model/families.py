"""The few facts about model families that cannot be read off their structure, as data.

Most families need no entry: both ends run the family's own Hugging Face code. An entry either
corrects a guess of `decoder.find_decoder` or gives the reason why a family is refused. A family
outside `TESTED` is served with a warning. docs/families.md has the results.
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


TESTED = frozenset(
    """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
    ctrl cwm deepseek_v2 deepseek_v3 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
    falcon flex_olmo flint gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4
    glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
    hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4_text mellum
    mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder mpt
    nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
    """.split()
)
"""Model types whose output is compared with the local model's in the project's tests."""


def family_of(model_type: str) -> Family:
    """The declared facts of a family; all defaults if it has no entry."""
    return FAMILIES.get(model_type, Family())
