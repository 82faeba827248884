"""What people pass to `from_pretrained` from habit: harmless, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

from planetserve.client.hf.from_pretrained import (
    AutoDistributedConfig,
    AutoDistributedModelForCausalLM,
)
from planetserve.client.hf.options import (
    OwnSettings,
    drop_inapplicable_options,
    dtype_text,
    parse_device,
)
from planetserve.errors import ConfigError
from planetserve.model.checkpoint import Checkpoint
from planetserve.testing.checkpoints import make_tiny_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))


HARMLESS: dict[str, Any] = {
    "low_cpu_mem_usage": True,
    "attn_implementation": "flash_attention_2",
    "trust_remote_code": True,
    "max_memory": {0: "10GiB", "cpu": "30GiB"},
    "offload_folder": "offload",
    "offload_state_dict": True,
    "use_safetensors": True,
    "force_download": True,
    "resume_download": True,
    "tp_plan": "auto",
    "use_flash_attention_2": True,
    "ignore_mismatched_sizes": True,
    "weights_only": True,
    "use_chunked_forward": True,
    "proxies": {"https": "proxy"},
}
REFUSED: dict[str, Any] = {
    "load_in_8bit": True,
    "load_in_4bit": True,
    "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
    "variant": "fp16",
    "subfolder": "model",
    "gguf_file": "model.gguf",
    "from_tf": True,
    "state_dict": {"a": torch.zeros(1)},
    "output_loading_info": True,
    "output_attentions": True,
    "active_adapter": "org/lora",
    "pre_seq_len": 16,
    "tuning_mode": "ptune",
}


def test_what_is_harmless_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    options = {**HARMLESS, "initial_peers": ["x"]}
    drop_inapplicable_options(options)
    assert options == {"initial_peers": ["x"]}
    assert len(caplog.records) == 1
    assert all(name in caplog.text for name in HARMLESS)


def test_what_is_passed_empty_is_dropped_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    options = {
        **dict.fromkeys(HARMLESS),
        **dict.fromkeys(REFUSED, False),
        "trust_remote_code": False,
    }
    drop_inapplicable_options(options)
    assert not options
    assert not caplog.records


@pytest.mark.parametrize("name", [*REFUSED, "use_safetensors"])
def test_what_would_be_a_lie_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name) as error:
        drop_inapplicable_options({name: REFUSED.get(name, False)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "device_map",
    [
        None,
        "cpu",
        "auto",
        "balanced",
        torch.device("cpu"),
        {"": "cpu"},
        {"model": "cpu", "lm_head": torch.device("cpu")},
    ],
)
def test_the_local_half_is_in_one_place(device_map: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device(device_map) == torch.device("cpu")


@pytest.mark.parametrize(
    "device_map", ["cuda:99", 99, "disk", "meta", {"": "disk"}, {"a": "cpu", "b": 0}, {}, 1.5, []]
)
def test_other_places_are_refused(device_map: Any) -> None:
    with pytest.raises(ConfigError, match="device_map") as error:
        parse_device(device_map)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "auto"),
        ({"torch_dtype": "auto"}, "auto"),
        ({"dtype": torch.float16}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "half", "torch_dtype": torch.float16}, "float16"),
        ({"dtype": "float"}, "float32"),
        ({"dtype": "float13"}, "float13"),
    ],
)
def test_dtypes_have_many_spellings(given: dict[str, Any], name: str) -> None:
    assert dtype_text(given.get("dtype"), given.get("torch_dtype")) == name


def test_contradicting_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        dtype_text("float32", torch.float16)


def own(folder: Path, config: Any = None, **options: Any) -> tuple[OwnSettings, dict[str, Any]]:
    """The settings, and what is left of the options."""
    return OwnSettings(Checkpoint.open(folder), config, options), options


class Half:
    """What settings are applied to."""

    def __init__(self, folder: Path):
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig()


def test_settings_of_the_local_half_are_applied(llama: Path) -> None:
    half = Half(llama)
    settings, left = own(llama, pad_token_id=7, use_cache=False, initial_peers=["x"])
    settings.apply(half)
    assert left == {"initial_peers": ["x"]}
    assert half.config.pad_token_id == half.generation_config.pad_token_id == 7
    assert half.config.use_cache is False
    given = GenerationConfig(temperature=0.5)
    own(llama, generation_config=given)[0].apply(half)
    assert half.generation_config is given


def test_the_models_own_configuration_may_be_passed(llama: Path) -> None:
    config = AutoDistributedConfig.from_pretrained(llama, initial_peers=["x"])
    assert own(llama, config, hidden_size=config.hidden_size)[1] == {"initial_peers": ["x"]}
    assert own(llama, config, initial_peers=["y"])[1] == {"initial_peers": ["y"]}
    config.chain_spread, config.request_timeout = 0.2, 9.0  # old names of options
    assert own(llama, config)[1].keys() == {"initial_peers", "chain_spread", "request_timeout"}
    config.pad_token_id = 9
    half = Half(llama)
    own(llama, config)[0].apply(half)
    assert half.config.pad_token_id == 9
    config.rms_norm_eps = 0.5
    for change in ({"config": config}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}):
        with pytest.raises(ConfigError, match="differs from the model's own configuration"):
            own(llama, **change)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initial_peer": ["x"]}, "did you mean 'initial_peers'"),
        ({"initial_peers": ["x"], "load_in_8bit": True}, "load_in_8bit"),
        ({"initial_peers": ["x"], "num_hidden_layers": 2}, "num_hidden_layers"),
        ({"initial_peers": ["x"], "generation_config": {}}, "GenerationConfig"),
        ({"initial_peers": ["x"], "dtype": "int8"}, "int8"),
        ({"initial_peers": ["x"], "dtype": 16}, "16"),
        ({"initial_peers": 5}, "initial_peers"),
        ({"initial_peers": ["x"], "config": {"hidden_size": 5}}, "config is a ClientConfig"),
    ],
)
def test_a_load_checks_before_it_joins(llama: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        AutoDistributedModelForCausalLM.from_pretrained(llama, **options)
    assert "\n" not in str(error.value)


def test_a_configuration_takes_what_the_model_takes(llama: Path) -> None:
    config = AutoDistributedConfig.from_pretrained(
        llama, token=False, trust_remote_code=False, local_files_only=True, use_auth_token=None
    )
    assert config.num_hidden_layers == 4
    named = AutoDistributedConfig.from_pretrained(pretrained_model_name_or_path=str(llama))
    assert named.to_dict() == config.to_dict()
    assert AutoDistributedConfig.from_pretrained(llama, chain_spread=0.2).chain_cost_jitter == 0.2
    for options in ({"initial_peer": "x"}, {"hidden_size": 5}, {"load_in_4bit": True}):
        with pytest.raises(ConfigError):
            AutoDistributedConfig.from_pretrained(llama, **options)
