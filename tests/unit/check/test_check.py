"""`planetserve check`: what it finds out about tiny checkpoints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from planetserve.check import main
from planetserve.check.comparison import Comparison, compare
from planetserve.check.report import as_json, as_text
from planetserve.check.slices import shortened
from planetserve.check.trial import Report, check
from planetserve.errors import ConfigError, ModelError
from planetserve.model import families
from planetserve.model.checkpoint import Checkpoint
from planetserve.testing import checkpoints
from planetserve.testing.checkpoints import TinyFamily, make_tiny_checkpoint
from planetserve.testing.stored_weights import make_stored_checkpoint


def check_folder(folder: Path, **options: Any) -> Report:
    return check(Checkpoint.open(str(folder)), progress=lambda _: None, **options)


def test_a_plain_model(tmp_path: Path) -> None:
    report = check_folder(make_tiny_checkpoint(tmp_path, "llama"))
    assert report.is_equal
    found = report.comparison
    assert (found.num_blocks, found.is_local_own) == (4, True)
    assert found.equal_tokens == found.num_tokens == 13
    assert (report.batching.way, report.batching.sessions) == ("ragged", None)
    assert report.batching.kv_bytes_per_token == 4 * 2 * 2 * 8 * 2
    (sizes,) = report.sizes
    assert sizes.kind.blocks == (0, 1, 2, 3)
    num_weights = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
    assert sizes.memory_bytes["float32"] == sizes.stored_bytes == 4 * num_weights
    assert sizes.memory_bytes["bfloat16"] == 2 * num_weights
    assert report.notes == []
    assert "logits equal" in as_text(report)


def test_kinds_of_blocks_and_states(tmp_path: Path) -> None:
    report = check_folder(make_tiny_checkpoint(tmp_path, "qwen3_next"))
    assert report.is_equal
    assert [sizes.kind.blocks for sizes in report.sizes] == [(0, 2), (1, 3)]
    assert "linear_attention" in report.sizes[0].kind.name
    assert report.batching.way == "padded"
    assert report.batching.sessions > 8
    assert report.batching.state_bytes > 0
    assert any("local_blocks" in note for note in report.notes)


def test_weights_that_are_stored_quantised(tmp_path: Path) -> None:
    quantised, _ = make_stored_checkpoint(tmp_path, "fp8_blocks")
    report = check_folder(quantised)
    assert report.is_equal
    assert not report.comparison.is_local_own
    assert report.quantization == "fp8"
    assert report.sizes[0].stored_bytes < report.sizes[0].memory_bytes["bfloat16"]


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "falcon_h1", "gemma4_moe", "gpt_neo", "jamba", "lfm2", "nemotron_h", "qwen3_5"],
)
def test_the_first_blocks_alone(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(tmp_path, family)))
    short = shortened(checkpoint, 3)
    assert (short.num_blocks, checkpoint.num_blocks) == (3, 4)
    found = compare(short)
    assert found.is_equal
    assert (found.num_blocks, found.is_local_own, found.wrong_cuts) == (3, False, {})


def test_of_a_large_model_a_block_of_each_kind_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planetserve.check.trial._SMALL_BYTES", 0)
    kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 3
    folder = make_tiny_checkpoint(tmp_path, "gemma2", num_hidden_layers=9, layer_types=kinds)
    report = check_folder(folder)
    assert report.is_equal
    assert report.comparison.num_blocks == 6
    assert "cut between the first 6 blocks" in as_text(report)
    assert check_folder(folder, whole=True).comparison.num_blocks == 9
    # What does not fit is said.
    monkeypatch.setattr("planetserve.check.trial._available_bytes", lambda: 200_000)
    report = check_folder(folder)
    assert report.comparison.num_blocks < 6
    assert any("not tried: full_attention" in note for note in report.notes)
    monkeypatch.setattr("planetserve.check.trial._available_bytes", lambda: 2_000)
    with pytest.raises(ModelError, match="check it on a larger machine"):
        check_folder(folder)


def test_a_model_that_must_not_be_cut_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if nobody knew that this one must be refused.
    monkeypatch.delitem(families.FAMILIES, "inkling2_text")
    monkeypatch.setitem(checkpoints.FAMILIES, "inkling2_text", TinyFamily("inkling2_text"))
    folder = make_tiny_checkpoint(tmp_path, "inkling2_text")
    with pytest.raises(ModelError, match="cannot be served: cut before block 1 and 2 more places"):
        main([str(folder)])
    output = capsys.readouterr().out
    assert "logits DIFFER" in output
    assert "cut before block 3 alone: logits differ by up to" in output
    assert "batching" not in output


def test_missing_and_misshapen_weights_are_one_line(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("model.layers.3.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights.*layers.3.mlp.up_proj") as error:
        check_folder(folder)
    assert "\n" not in str(error.value)
    tensors["model.layers.3.mlp.up_proj.weight"] = lost[:40].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="has shape"):
        check_folder(folder)


def test_an_untested_family_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_checkpoint(tmp_path, "olmo2")
    monkeypatch.setattr("planetserve.check.trial.TESTED", families.TESTED - {"olmo2"})
    assert "docs/add_a_family.md" in check_folder(folder).notes[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(make_tiny_checkpoint(tmp_path, "gpt2"))
    main([folder])
    output = capsys.readouterr()
    assert output.out.startswith(f"{tmp_path.name}: gpt2, 4 blocks")
    assert "loading blocks 3:4 of 4" in output.err
    main([folder, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["is_served"]
    assert values["reason"] is None
    assert values["batching"]["way"] == "ragged"


def test_refusals_are_one_line_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(make_tiny_checkpoint(tmp_path, "gemma3n_text"))
    with pytest.raises(ModelError, match="share keys and values"):
        main([folder, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert not values["is_served"]
    assert "share keys and values" in values["reason"]
    with pytest.raises(ConfigError, match="which MODEL"):
        main([])


def test_a_difference_is_said_in_one_line() -> None:
    wrong = {3: "logits differ by up to 2.0e+00", 5: "logits differ by up to 1.0e+00"}
    found = Comparison(8, 2.5, 1.0, 1e-4, 4, 13, wrong, is_local_own=True)
    assert not found.is_equal
    assert found.why_not_equal == (
        "cut before block 3 and 1 more places, logits differ by up to 2.0e+00"
    )
    broken = Comparison(8, float("nan"), 1.0, 1e-4, 4, 13, {}, is_local_own=True)
    assert not broken.is_equal
    report = Report("x", "llama", 8, None, [], broken, None, [])
    assert json.loads(as_json(report))["comparison"]["max_error"] is None
