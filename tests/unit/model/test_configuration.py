"""A stranger's configuration says what a model is; how it is run, and with whose code, is ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.client_half import load_client_half
from planetserve.model.span_blocks import SpanBlocks
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan

KERNEL = "somebody/kernels"

INSTRUCTIONS: list[dict[str, Any]] = [
    {"attn_implementation": KERNEL},
    {"attn_implementation": {"": KERNEL}},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": "no_such"},
    {"_attn_implementation": KERNEL},
    {"_attn_implementation_internal": KERNEL},
    {"attribute_map": {"innocent": "_attn_implementation_internal"}, "innocent": KERNEL},
    {"experts_implementation": "sonicmoe"},
    {"_experts_implementation": "deepgemm"},
    {"use_kernels": True, "kernel_config": {"RMSNorm": KERNEL}, "fusion_config": {"all": True}},
    {
        "auto_map": {
            "AutoConfig": f"{KERNEL}--evil.Config",
            "AutoModelForCausalLM": f"{KERNEL}--evil.Model",
        }
    },
    {"backbone": KERNEL, "use_pretrained_backbone": True, "distributed_config": {"tp": 2}},
    {"num_labels": 10**12},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model", "mixtral")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes", INSTRUCTIONS, ids=lambda changes: next(iter(changes)))
def test_what_a_configuration_tells_to_run_is_not_run(
    folder: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("looked at the hub")

    monkeypatch.setattr("transformers.integrations.hub_kernels.is_kernel", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    edit(folder, **changes)
    checkpoint = Checkpoint.open(str(folder))
    blocks = SpanBlocks.load(checkpoint, BlockSpan(1, 2), torch.float32)
    client = load_client_half(checkpoint, torch.float32, "cpu", remote=lambda hidden: hidden)
    assert blocks.config._attn_implementation == "sdpa"
    assert type(client).__module__.startswith("transformers.")
    assert client.config._experts_implementation != changes.get("experts_implementation")


def test_other_values_are_those_of_transformers(folder: Path) -> None:
    edit(folder, rope_scaling={"rope_type": "linear", "factor": 2.0}, somebodys_own=[1, 2])
    ours, local = Checkpoint.open(str(folder)).config, AutoConfig.from_pretrained(folder)
    assert type(ours) is type(local)
    assert ours.to_dict() == local.to_dict()


def test_what_has_no_effect_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checkpoint.open(str(folder))
    assert not caplog.records
    edit(folder, attn_implementation=KERNEL, auto_map={"AutoConfig": "evil.Config"})
    Checkpoint.open(str(folder))
    assert [record.getMessage() for record in caplog.records] == [
        "model: config.json sets attn_implementation, which has no effect here"
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"model_type": ["llama"]}', "no name as model_type"),
        (b'{"model_type": "llama", "num_hidden_layers": 1000000000000}', "which no model has"),
        (b'{"model_type": "llama", "num_hidden_layers": 1e400}', "which no model has"),
        (b'{"model_type": "llama", "num_hidden_layers": 0}', "which no model has"),
        (b'{"model_type": "llama", "num_attention_heads": 0}', "cannot (read|build)"),
        (b'{"model_type": "llama", "layer_types": ["x"]}', "cannot read the configuration"),
        (b'{"model_type": "llama", "to_dict": 3, "__class__": 1}', "cannot read"),
        (b'{"model_type": "llama", "configuration_files": ["x"]}', "points to other files"),
        (b'{"model_type": "llama", "quantization": {"bits": 4}}', "MLX.*--dequantize"),
        (b'{"model_type": "of_tomorrow"}', "has no model of this type; give"),
        (b'{"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}', "code.*is never run"),
        (b'{"model_type": "bert"}', "it is an encoder"),
        (b'{"model_type": "t5"}', "encoder-decoder"),
        (
            b'{"model_type": "detr", "backbone": "somebody/x"}',
            "no model of this type",
        ),
        (b'{"peft_type": "LORA", "base_model_name_or_path": "x"}', "adapter"),
        (b'{"dim": 4096, "n_layers": 32}', "maker's own layout"),
    ],
)
def test_odd_configurations_are_refused_in_one_line(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=words) as error:
        SpanBlocks.load(Checkpoint.open(str(tmp_path)), BlockSpan(0, 1), torch.float32)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert "trust_remote_code" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"[" * 100_000, b"", b'{"max_length": {"a": 1}}', b'{"temperature": NaN}',
        b'{"top_k": 2.5}', b'{"max_new_tokens": true}', b'{"watermarking_config": 3}',
    ],
)  # fmt: skip
def test_odd_generation_settings_are_refused_in_one_line(folder: Path, content: bytes) -> None:
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"generation_config\.json") as error:
        Checkpoint.open(str(folder)).generation_config()
    assert "\n" not in str(error.value)


def test_generation_settings_replace_nothing_but_settings(folder: Path) -> None:
    settings = {"temperature": 0.5, "validate": 1, "custom_generate": KERNEL, "update": None,
                "compile_config": {"backend": KERNEL}, "_original_object_hash": 3}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = Checkpoint.open(str(folder)).generation_config()
    assert config is not None
    assert config.temperature == 0.5
    assert callable(config.validate)
    assert callable(config.update)
    assert config.compile_config is None
    assert not hasattr(config, "custom_generate")


def test_a_type_under_another_name_is_what_it_is(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, "deepseek_v3")
    edit(tmp_path, model_type="kimi_k2", auto_map={"AutoModel": "modeling_deepseek.DeepseekV3"})
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.config.model_type == "deepseek_v3"
    assert len(SpanBlocks.load(checkpoint, BlockSpan(1, 3), torch.float32).layers) == 2
