"""Only what is asked for becomes real, exactly as `from_pretrained` would have loaded it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.client_half import load_client_half
from planetserve.model.loading import build_on_meta, load_parameters
from planetserve.model.span_blocks import SpanBlocks
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan


def test_a_skeleton_takes_no_memory(llama: Path) -> None:
    model = build_on_meta(Checkpoint.open(str(llama)), torch.bfloat16)
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_only_wanted_parameters_become_real(llama: Path) -> None:
    checkpoint = Checkpoint.open(str(llama))
    model = build_on_meta(checkpoint, torch.float32)
    load_parameters(model, checkpoint, lambda name: "layers.2." in name, torch.float32, "cpu")
    real = {name for name, value in model.named_parameters() if not value.is_meta}
    assert real == {name for name, _ in model.named_parameters() if "layers.2." in name}
    assert not any(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "bloom", "deepseek_v3", "nemotron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_span_weights_and_buffers_equal_from_pretrained(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path, family)
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    blocks = SpanBlocks.load(Checkpoint.open(str(folder)), BlockSpan(1, 3), dtype)
    local_layers = next(m for m in local.modules() if isinstance(m, torch.nn.ModuleList))
    for index, layer in enumerate(blocks.layers, start=1):
        expected = local_layers[index]
        pairs = [
            *zip(layer.named_parameters(), expected.named_parameters(), strict=True),
            *zip(layer.named_buffers(), expected.named_buffers(), strict=True),
        ]
        for (name, value), (expected_name, expected_value) in pairs:
            assert name == expected_name
            assert value.dtype == expected_value.dtype
            assert torch.equal(value, expected_value), name


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "llama_mqa_tied")
    assert "lm_head.weight" not in Checkpoint.open(str(folder)).tensor_names()
    model = load_client_half(
        Checkpoint.open(str(folder)), torch.float32, "cpu", remote=lambda hidden: hidden
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        SpanBlocks.load(checkpoint, BlockSpan(0, 2), torch.float32)
    SpanBlocks.load(checkpoint, BlockSpan(2, 4), torch.float32)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(ModelError, match=r"mlp.*shape"):
        SpanBlocks.load(Checkpoint.open(str(folder)), BlockSpan(0, 1), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("more layers", r"lacks weights.*layers\.4\."),
        ("one missing", r"lacks weights.*layers\.3\.mlp\.up_proj"),
        ("other shape", r"layers\.3\.mlp\.up_proj.*shape"),
        ("whole numbers", r"layers\.3\.mlp\.up_proj.*stored as int8"),
    ],
)
def test_what_headers_show_to_be_wrong_is_refused_before_weights_are_read(
    tmp_path: Path, change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    name = "model.layers.3.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    if change == "more layers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    elif change == "one missing":
        del tensors[name]
    elif change == "other shape":
        tensors[name] = tensors[name][1:].contiguous()
    else:
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    read = []
    monkeypatch.setattr(Checkpoint, "read_tensor", lambda self, name: read.append(name))
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(ModelError, match=message):
        SpanBlocks.load(checkpoint, BlockSpan(0, checkpoint.num_blocks), torch.float32)
    assert read == []


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
@pytest.mark.parametrize("quant_type", ["none", "int8"])
def test_weights_whose_scales_are_elsewhere_are_never_served_as_numbers(
    family: str, dtype: torch.dtype, quant_type: str, tmp_path: Path
) -> None:
    path = make_tiny_checkpoint(tmp_path, family) / "model.safetensors"
    tensors = load_file(path)
    name = max(n for n in tensors if tensors[n].dim() == 2 and re.search(r"(layers|h)\.2\.", n))
    tensors[name] = tensors[name].to(dtype)
    tensors[f"{name}_scale"] = torch.ones(1)
    save_file(tensors, path)
    checkpoint = Checkpoint.open(str(tmp_path))
    with pytest.raises(ModelError, match=rf"{re.escape(name)} is stored as {str(dtype)[6:]}"):
        SpanBlocks.load(checkpoint, BlockSpan(1, 3), torch.float32, quant_type=quant_type)
    SpanBlocks.load(checkpoint, BlockSpan(0, 2), torch.float32)


def test_damage_in_a_shard_stays_an_error_of_that_file(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        SpanBlocks.load(Checkpoint.open(str(folder)), BlockSpan(0, 1), torch.float32)


_PEAK = """
import re, sys, torch
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.types import BlockSpan
import transformers.models.llama.modeling_llama

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))

before = peak_kib()
blocks = SpanBlocks.load(Checkpoint.open(sys.argv[1]), BlockSpan(3, 4), torch.float32)
print(sum(p.nbytes for p in blocks.layers.parameters()), (peak_kib() - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_near_the_bytes_of_the_span(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=20000
    )
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder)], capture_output=True, text=True, check=True
    )
    span, peak = (int(number) for number in re.findall(r"\d+", done.stdout)[-2:])
    assert span < total / 8
    assert peak < span + 30 * 2**20 < total / 2
