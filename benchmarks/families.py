"""Tokens per second through one server, against transformers alone, for many model families.

    python benchmarks/families.py                   ten minutes
    python benchmarks/families.py falcon mixtral    these alone

A random model of 40 to 120 million parameters is made of each family. Local transformers (one
stream, and one static batch of as many rows as there are sessions) and one server on loopback take
turns within one invocation, one thread per process. A model that is stored quantised is compared
with the plain one of the same, rounded weights, which transformers reads. Every token is compared
with what local transformers generates for that prompt alone. Rates are steady, as in `engine.py`.
So small a model shows what a family costs besides reading its weights; the larger it is, the less
that matters.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import engine
import torch
from common import environment, load, table, write_result
from processes import prepare
from transformers import AutoConfig, AutoModelForCausalLM

from planetserve.testing.stored_weights import store_quantised

_COMMON = {
    "vocab_size": 16000,
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_GATED = {**_COMMON, "num_key_value_heads": 4, "intermediate_size": 2048}
_WIDE = {**_COMMON, "intermediate_size": 3072}
_MIXTURE = {**_GATED, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2}
_GPT = {"vocab_size": 16000, "n_embd": 768, "n_layer": 8, "n_head": 12, "n_positions": 2048}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _GATED),
    "qwen3": ("qwen3", {**_GATED, "head_dim": 64}),
    "gemma2": ("gemma2", {**_GATED, "head_dim": 64, "sliding_window": 512}),
    "gpt2": ("gpt2", _GPT),
    "opt": ("opt", {**_COMMON, "ffn_dim": 3072, "word_embed_proj_dim": 768}),
    "gpt_neox": ("gpt_neox", _WIDE),
    "phi": ("phi", _WIDE),
    "bloom": ("bloom", {"vocab_size": 16000, "hidden_size": 768, "n_layer": 8, "n_head": 12}),
    "falcon": ("falcon", {**_COMMON, "alibi": False, "new_decoder_architecture": False}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 32}),
    "stablelm": ("stablelm", {**_GATED, "num_key_value_heads": 12}),
    "mixtral": ("mixtral", {**_GATED, "intermediate_size": 1024, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**_MIXTURE, "moe_intermediate_size": 512}),
    "gpt_oss": (
        "gpt_oss",
        {**_MIXTURE, "intermediate_size": 512, "num_local_experts": 8, "sliding_window": 128},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**_GATED, "num_key_value_heads": 12, "moe_intermediate_size": 512, "n_routed_experts": 8,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
         "q_lora_rank": 256, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
         "v_head_dim": 64},
    ),
    "llama_w8a8": ("llama", _GATED),
    # Three layers of four are gated delta nets.
    "qwen3_5": (
        "qwen3_5_text",
        {**_GATED, "head_dim": 64, "linear_num_key_heads": 6, "linear_num_value_heads": 12,
         "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    ),
}  # fmt: skip
"""Model types and configurations by name."""

STORED: Mapping[str, str] = {"llama_w8a8": "compressed_w8a8"}
"""Names of those whose weights are stored quantised, and how."""


def make_checkpoint(folder: Path, family: str) -> int:
    """Write a random model that never ends a text by itself; returns its number of parameters."""
    model_type, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    add("--sessions", nargs="+", type=int, default=[1, 8])
    add("--prompt_tokens", type=int, default=64)
    add("--new_tokens", type=int, default=48)
    add("--rounds", type=int, default=2)
    add("--dtype", default="float32")
    options = parser.parse_args(argv)
    unknown = set(options.families) - set(FAMILIES)
    if unknown:
        parser.error(f"no such family here: {', '.join(sorted(unknown))}")
    options.families = options.families or list(FAMILIES)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    prepare()
    result: dict[str, Any] = {
        "benchmark": "families",
        "environment": environment(),
        "settings": vars(options),
        "threads_per_process": 1,
    }
    engine_options = engine.parse(
        ["--dtypes", options.dtype, "--chains", "1",
         "--sessions", *map(str, options.sessions), "--rounds", str(options.rounds),
         "--prompt_tokens", str(options.prompt_tokens), "--new_tokens", str(options.new_tokens)]
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    for family in options.families:
        with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as folder:
            served = plain = Path(folder) / "plain"
            num_parameters = make_checkpoint(plain, family)
            if family in STORED:
                served = store_quantised(plain, Path(folder) / "quantised", STORED[family])
            cases = engine.measure(served, options.dtype, engine_options, plain)
        rows = [case.summary() for case in cases]
        engine.add_ratios(rows)
        found += [
            {"family": family, "parameters": num_parameters, **row}
            for row in rows
            if row["target"] != engine.LOCAL
        ]
        gc.collect()
    result["cases"] = found
    result["load_after"] = load()
    header = ["family", "sessions", "tokens/s", "ratio", "first token", "equal"]
    lines = [
        [case["family"], case["sessions"], case["tokens_per_s"], case["ratio"],
         case["first_token_ratio"], f"{case['equal_tokens']}/{case['tokens']}"]
        for case in found
    ]  # fmt: skip
    print(table(header, lines))
    print(f"written to {write_result('families', result)}")


if __name__ == "__main__":
    main()
