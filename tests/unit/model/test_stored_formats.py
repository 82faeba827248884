"""Weights stored quantised give what a local model of the dequantised weights gives."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from planetserve.check.chain import LocalChain, local_logits
from planetserve.errors import ModelError
from planetserve.model import stored_linear
from planetserve.model.checkpoint import Checkpoint, parse_dtype
from planetserve.model.span_blocks import SpanBlocks
from planetserve.model.stored_linear import QuantizedLinear
from planetserve.model.weights import Weights
from planetserve.testing.checkpoints import load_local
from planetserve.testing.stored_weights import METHODS, make_stored_checkpoint
from planetserve.types import BlockSpan

IDS = torch.tensor([[5, 9, 17, 3, 44, 8, 60]])
UP = "model.layers.2.mlp.up_proj"


def chain_of(folder: Path, quant_type: str = "none") -> LocalChain:
    spans = [BlockSpan(0, 1), BlockSpan(1, 3), BlockSpan(3, 4)]
    checkpoint = Checkpoint.open(str(folder))
    return LocalChain(checkpoint, [(span, span) for span in spans], quant_type=quant_type)


DEQUANTISED = {"bnb_fp4_nested", "bnb_nf4", "fp8_blocks", "gptq_8", "gptq_act_order"}
"""Formats without kernels, or whose groups here have a size that they do not read."""


def assert_equal(folder: Path, method: str, family: str) -> None:
    """Dequantised as well as kept, whatever of it can be kept."""
    quantised, plain = make_stored_checkpoint(folder, method, family)
    expected = local_logits(load_local(plain), [IDS])[0]
    for quant_type in ("none", "stored"):
        chain = chain_of(quantised, quant_type)
        torch.testing.assert_close(chain.logits(IDS), expected, atol=1e-4, rtol=0)
        # A second pass of one token, over the cache.
        both = torch.cat([IDS, IDS[:, :1]], dim=1)
        last = local_logits(load_local(plain), [both])[0][:, -1:]
        torch.testing.assert_close(chain.logits(IDS[:, :1]), last, atol=1e-4, rtol=0)


def kept(folder: Path) -> set[str]:
    """The layers that keep their stored numbers."""
    blocks = SpanBlocks.load(
        Checkpoint.open(str(folder)), BlockSpan(1, 3), torch.float32, quant_type="stored"
    )
    found = blocks.layers.named_modules()
    return {name for name, module in found if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"mxfp4"}))
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_format_equals_local(method: str, family: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, method, family)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"mxfp4"}))
def test_which_formats_keep_their_numbers(method: str, tmp_path: Path) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, method)
    assert bool(kept(quantised)) == (method not in DEQUANTISED), method


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("mxfp4", "gpt_oss"),
        ("fp8_blocks", "deepseek_v3"),
        ("compressed_int4", "deepseek_v3"),
        ("fp8_blocks", "minimax_m2"),
        ("fp8_static", "mistral3_ministral3"),
        ("modelopt_nvfp4", "gemma3"),
        ("fp8_blocks", "qwen3_vl"),
        ("compressed_int4", "kimi_k25"),
    ],
)
def test_formats_and_families_that_are_published_together(
    method: str, family: str, tmp_path: Path
) -> None:
    assert_equal(tmp_path, method, family)


def test_settings_may_be_those_of_the_language_model(tmp_path: Path) -> None:
    quantised, plain = make_stored_checkpoint(tmp_path, "compressed_int4", "kimi_k25")
    config = json.loads((quantised / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (quantised / "config.json").write_text(json.dumps(config))
    expected = local_logits(load_local(plain), [IDS])[0]
    torch.testing.assert_close(chain_of(quantised).logits(IDS), expected, atol=1e-4, rtol=0)


def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, "fp8_ue8m0")
    local = AutoModelForCausalLM.from_pretrained(
        quantised,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True),
    )
    checkpoint = Checkpoint.open(str(quantised))
    blocks = SpanBlocks.load(checkpoint, BlockSpan(1, 3), torch.bfloat16)
    for mine, theirs in zip(blocks.layers, local.model.layers[1:3], strict=True):
        for (name, value), (_, expected) in zip(
            mine.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert torch.equal(value, expected.to(torch.bfloat16)), name


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, "mxfp4", "gpt_oss")
    stored = load_file(quantised / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    got = Weights(Checkpoint.open(str(quantised))).read(name, torch.bfloat16)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("method", "family", "num_experts"),
    [("awq", "qwen3_moe", 4), ("mxfp4", "gpt_oss", 4), ("fp8_ue8m0", "qwen3_5_moe", 4)],
)
def test_experts_keep_their_numbers(
    method: str, family: str, num_experts: int, tmp_path: Path
) -> None:
    """Stacked, fused and transposed ones."""
    quantised, _ = make_stored_checkpoint(tmp_path, method, family)
    names = kept(quantised)
    for block, product, expert in itertools.product(
        range(2), ("entering", "leaving"), range(num_experts)
    ):
        assert f"{block}.mlp.experts.{product}.{expert}" in names


def test_a_weight_that_comes_out_otherwise_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say, rows that a conversion has put elsewhere than where they are looked for."""
    quantised, _ = make_stored_checkpoint(tmp_path, "awq", "qwen3_moe")
    runs = stored_linear._runs
    monkeypatch.setattr(stored_linear, "_runs", lambda ids, sources: runs(ids.flip(0), sources))
    with pytest.raises(ModelError, match="computes something else than dequantised") as error:
        kept(quantised)
    assert "--quant_type none" in str(error.value)


def test_gptq_whose_groups_are_shuffled_in_spite_of_its_settings(tmp_path: Path) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, "gptq_act_order")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["desc_act"] = False
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="groups do not follow one another"):
        kept(quantised)


@pytest.mark.parametrize("method", ["compressed_int4_zero_points", "fp8_ue8m0"])
def test_half_precision_rounds_inputs_and_results_only(method: str, tmp_path: Path) -> None:
    quantised, plain = make_stored_checkpoint(tmp_path, method)
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = SpanBlocks.load(Checkpoint.open(str(plain)), BlockSpan(0, 4), torch.float32)
    expected = exact.run(x.float())
    errors = {}
    for quant_type in ("none", "stored"):
        half = SpanBlocks.load(
            Checkpoint.open(str(quantised)), BlockSpan(0, 4), torch.bfloat16, quant_type=quant_type
        )
        errors[quant_type] = float((half.run(x).float() - expected).norm())
    assert errors["stored"] <= errors["none"]


@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
def test_a_server_may_quantise_them_again(quant_type: str, tmp_path: Path) -> None:
    quantised, plain = make_stored_checkpoint(tmp_path, "fp8_blocks")
    outputs = []
    for folder in (quantised, plain):
        checkpoint = Checkpoint.open(str(folder))
        blocks = SpanBlocks.load(checkpoint, BlockSpan(1, 3), torch.float32, quant_type=quant_type)
        outputs.append(blocks.run(torch.ones(1, 3, 64)))
    assert torch.equal(*outputs)


def test_auto_is_a_dtype_to_compute_in(tmp_path: Path) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, "fp8_blocks")
    config = json.loads((quantised / "config.json").read_text())
    config.pop("dtype", None)
    (quantised / "config.json").write_text(json.dumps(config))
    assert parse_dtype("auto", Checkpoint.open(str(quantised)), "cpu") in (
        torch.bfloat16, torch.float32,
    )  # fmt: skip


Tensors = dict[str, torch.Tensor]


def _drop(ending: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        del tensors[UP + ending]

    return drop


def _cut(ending: str) -> Callable[[Tensors], None]:
    def cut(tensors: Tensors) -> None:
        tensors[UP + ending] = tensors[UP + ending][:-1].contiguous()

    return cut


def _cast(ending: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def cast(tensors: Tensors) -> None:
        tensors[UP + ending] = tensors[UP + ending].float().to(dtype)

    return cast


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("fp8_blocks", _drop(".weight_scale_inv"), "means nothing without scales"),
        ("fp8_blocks", _cut(".weight_scale_inv"), "does not fit a weight of shape"),
        ("fp8_blocks", _cast(".weight_scale_inv", torch.int8), "is int8, not float32"),
        ("fp8_blocks", _cast(".weight", torch.bfloat16), "is bfloat16, not float8_e4m3fn"),
        ("fp8_blocks", _drop(".weight"), "is missing"),
        ("compressed_int4", _drop(".weight_scale"), "is missing"),
        ("compressed_int4", _cut(".weight_scale"), "does not fit numbers packed"),
        ("compressed_int4", _cast(".weight_packed", torch.float32), "is float32"),
        ("compressed_int4_zero_points", _cut(".weight_zero_point"), "its zero points"),
        ("compressed_w8a8", _cut(".weight_scale"), "does not fit a weight"),
        ("gptq", _drop(".qzeros"), "is missing"),
        ("gptq", _cut(".scales"), "its scales"),
        ("gptq", _cut(".g_idx"), "its groups"),
        ("awq", _cast(".scales", torch.int32), "is int32, not float32"),
        ("awq", _cut(".qzeros"), "its zero points"),
        ("modelopt_nvfp4", _drop(".weight_scale_2"), "does not fit a weight|uint8, not"),
        ("modelopt_nvfp4", _cut(".weight_scale"), "its scales"),
        ("modelopt_fp8", _drop(".weight_scale"), "means nothing without scales"),
        ("bnb_nf4", _drop(".weight.quant_map"), "is missing"),
        ("bnb_nf4", _drop(".weight.quant_state.bitsandbytes__nf4"), "no quant_state"),
        ("bnb_int8", _cut(".SCB"), "its scales"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line_before_anything_is_read(
    method: str,
    change: Callable[[Tensors], None],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, method)
    tensors = load_file(quantised / "model.safetensors")
    change(tensors)
    save_file(tensors, quantised / "model.safetensors")
    read: list[str] = []
    monkeypatch.setattr(Checkpoint, "read_tensor", lambda self, name: read.append(name))
    with pytest.raises(ModelError, match=words) as error:
        SpanBlocks.load(Checkpoint.open(str(quantised)), BlockSpan(0, 4), torch.float32)
    assert UP in str(error.value)
    assert "\n" not in str(error.value)
    assert read == []


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("gptq", {"quant_method": "aqlm"}, "'aqlm', which is not read"),
        ("gptq", {"quant_method": None}, "'None', which is not read"),
        ("gptq", {"bits": 3}, "bits 3 is not read"),
        ("gptq", {"bits": 8}, "not stored as gptq"),
        ("gptq", {"group_size": 16}, "its scales"),
        ("gptq", {"group_size": "x"}, "group_size 'x'"),
        ("gptq", {"quant_method": "fp8"}, "stored as fp8, but none is"),
        ("awq", {"version": "gemv"}, "only 4 in gemm"),
        ("fp8_blocks", {"weight_block_size": [16, 16]}, "does not fit a weight"),
        ("fp8_blocks", {"weight_block_size": "x"}, "blocks of 'x'"),
        ("compressed_int4", {"config_groups": {}}, "no bits"),
        ("compressed_int4", {"transform_config": {"a": 1}}, "transforms"),
        ("compressed_int4", {"quant_method": "modelopt"}, "is missing"),
    ],
)
def test_settings_that_contradict_the_tensors_are_one_line(
    method: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, method)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] |= settings
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words) as error:
        SpanBlocks.load(Checkpoint.open(str(quantised)), BlockSpan(0, 4), torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["fp8_blocks", "gptq", "compressed_int4", "bnb_nf4"])
def test_a_checkpoint_that_names_no_format_is_refused(method: str, tmp_path: Path) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, method)
    config = json.loads((quantised / "config.json").read_text())
    del config["quantization_config"]
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="names no format|lacks weights"):
        SpanBlocks.load(Checkpoint.open(str(quantised)), BlockSpan(0, 4), torch.float32)


_PEAK = """
import re, sys, torch
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.malloc_tuning import returning_freed_memory
from planetserve.model.span_blocks import SpanBlocks
from planetserve.model.stored_linear import QuantizedLinear
from planetserve.types import BlockSpan
import transformers.models.mixtral.modeling_mixtral, transformers.models.gpt_oss.modeling_gpt_oss

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))

checkpoint = Checkpoint.open(sys.argv[1])
span = BlockSpan(0, checkpoint.num_blocks)
with returning_freed_memory():
    before = peak_kib()
    blocks = SpanBlocks.load(checkpoint, span, torch.bfloat16, quant_type=sys.argv[2])
    peak = (peak_kib() - before) * 1024
kept = [m.quantized for m in blocks.layers.modules() if isinstance(m, QuantizedLinear)]
print(sum(x.nbytes if isinstance(x, torch.Tensor) else x.num_bytes
          for x in [*blocks.layers.parameters(), *kept]), peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("method", "family"),
    [("fp8_blocks", "mixtral"), ("compressed_int4", "mixtral"), ("mxfp4", "gpt_oss")],
)
def test_at_most_one_block_is_in_memory_above_what_stays(
    method: str, family: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8}
    quantised, _ = make_stored_checkpoint(tmp_path, method, family, **sizes)
    final, peak = final_and_peak_bytes(quantised, "none")
    assert final > 40 << 20
    assert peak < final + final / 4 + LOADING_BYTES


def final_and_peak_bytes(folder: Path, quant_type: str) -> tuple[int, int]:
    """Weights of all blocks, and the most that loading them took."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder), quant_type],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    final, peak = (int(number) for number in re.findall(r"\d+", done.stdout)[-2:])
    return final, peak


LOADING_BYTES = 16 << 20
"""What loading itself needs, whatever the size."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("method", "family"),
    [("fp8_of_128", "mixtral"), ("int4_of_128", "mixtral"), ("mxfp4", "gpt_oss")],
)
def test_kept_numbers_take_the_bytes_that_are_stored(
    method: str, family: str, tmp_path: Path
) -> None:
    sizes = {
        "hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "head_dim": 128,
        "num_hidden_layers": 8,
    }  # fmt: skip
    quantised, _ = make_stored_checkpoint(tmp_path, method, family, **sizes)
    checkpoint = Checkpoint.open(str(quantised))
    names = checkpoint.tensor_names()
    stored = checkpoint.tensor_bytes(n for n in names if ".layers." in n)
    dense = sum(p.numel() for p in SpanBlocks.load(
        checkpoint, BlockSpan(0, 1), torch.bfloat16).layers.parameters()) * 2  # fmt: skip
    # What is not stored quantised is float32 there and bfloat16 here.
    plain = [n for n in names if ".layers." in n and checkpoint.tensor_dtype(n) is torch.float32
             and "scale" not in n]  # fmt: skip
    stored -= checkpoint.tensor_bytes(plain) // 2
    final, peak = final_and_peak_bytes(quantised, "stored")
    assert final <= 1.05 * stored
    assert peak < final + dense + LOADING_BYTES
