"""Facts about model families that cannot be derived from their structure, as data.

Most families need no entry: both ends run the family's own Hugging Face code. An entry either
corrects a guess of `decoder.find_decoder` or gives the reason why a family is refused. A family
outside `TESTED` is served with a warning. docs/families.md has the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Declared facts about one `model_type`; defaults are derived from its structure."""

    refused: str | None = None
    """Why the family cannot be served, as the end of a sentence."""
    final_norm: str | None = None
    """Attribute of the base model that is called right after the layers."""
    norm_calls_before_layers: int = 0
    """How often the base model calls that same module before its layers."""
    needs_masks: bool = False
    """Whether the base model fails when transformers builds no attention mask for it, so that a
    client half has to build one although no layer will read it."""


_OWN_STATE = "its layers keep a recurrent state outside the caches that transformers shares"
_OTHER_RESULTS = "its layers, run in parts, give other results than the whole model"
_NO_ATTENTION = "it has no attention at all, and transformers runs it with a cache of another kind"
_EMBEDDINGS = "its layers read token embeddings besides the hidden states"

FAMILIES: Mapping[str, Family] = {
    "nanochat": Family(norm_calls_before_layers=1),
    "mpt": Family(needs_masks=True),
    "diffusion_gemma": Family(refused="it writes blocks of text by diffusion, not token by token"),
    "kosmos-2": Family(refused="it writes no text without an image"),
    "mllama": Family(refused="some of its layers attend to images instead of the text"),
    "openai-gpt": Family(refused="transformers runs it without a cache of keys and values"),
    "paligemma": Family(refused="it attends to its prompt in both directions"),
    "lfm2": Family(final_norm="embedding_norm"),
    "lfm2_moe": Family(final_norm="embedding_norm"),
    "lfm3": Family(final_norm="embedding_norm"),
    "falcon_mamba": Family(refused=_NO_ATTENTION),
    "inkling2": Family(refused=_OTHER_RESULTS),
    "inkling2_text": Family(refused=_OTHER_RESULTS),
    "inkling_mm_model": Family(refused=_OTHER_RESULTS),
    "inkling_text": Family(refused=_OTHER_RESULTS),
    "mamba": Family(refused=_NO_ATTENTION),
    "mamba2": Family(refused=_NO_ATTENTION),
    "minimax": Family(refused=_OWN_STATE),
    "recurrent_gemma": Family(refused=_OWN_STATE),
    "rwkv": Family(refused=_OWN_STATE),
    "xlstm": Family(refused=_OWN_STATE),
    "zamba": Family(refused=_EMBEDDINGS),
    "zamba2": Family(refused=_EMBEDDINGS),
    "zaya": Family(refused=_OTHER_RESULTS),
}


TESTED = frozenset(
    """
    afmoe apertus arcee aria aria_text axk1 aya_vision bailing_hybrid bamba beam biogpt bitnet
    bloom codegen cohere cohere2 cohere2_moe cohere2_vision cosmos3_omni ctrl cwm deepseek_v2
    deepseek_v3 deepseek_vl diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone4_5
    exaone_moe falcon falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma4
    gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm46v glm4_moe glm4_moe_lite glm4v
    glm4v_moe glm_ocr glmasr got_ocr2 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
    gpt_oss gptj granite granite_docling granite_speech granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hy_v3
    hyperclovax hyperclovax_vision_v2 idefics2 idefics3 internlm3 internvl iquestcoder jais2
    jamba jetmoe kimi_k25 kimi_linear kolibri1 kosmos-2.5 laguna lfm2 lfm2_moe lfm3 lighton_ocr
    llama llama4 llama4_text llava llava_next llava_next_video llava_onevision mellum
    mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mistral3 mixtral
    modernbert-decoder moss_transcribe_diarize mpt muse_glimmer nanochat nemotron nemotron_h olmo
    olmo2 olmo3
    olmo_hybrid olmoe opt paddleocr_vl persimmon phi phi3 phimoe qianfan_ocr qwen2 qwen2_5_vl
    qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
    qwen3_asr qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe seed_oss smollm3 smolvlm solar_open
    stablelm starcoder2 step3p7 vaultgemma video_llama_3 video_llava vipllava voxtral xglm youtu
    """.split()
)
"""Model types whose output is compared with the local model's in the project's tests."""


def family_of(model_type: str) -> Family:
    """The declared facts of a family; all defaults if it has no entry."""
    return FAMILIES.get(model_type, Family())
