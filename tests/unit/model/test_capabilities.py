"""What a configuration says about serving it: reasons, warnings and the tested families."""

from __future__ import annotations

from pathlib import Path

import pytest

from planetserve.errors import ModelError
from planetserve.model.capabilities import (
    check_servable,
    constant_rotary_length,
    has_recurrent_layers,
    refusal,
    warn_if_untested,
)
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.families import TESTED
from planetserve.testing.checkpoints import (
    FAMILIES,
    HYBRID_FAMILIES,
    SERVABLE_FAMILIES,
    tiny_config,
)


def test_tested_families_are_those_the_tests_cover() -> None:
    assert TESTED == {FAMILIES[name].model_type for name in SERVABLE_FAMILIES}


@pytest.mark.parametrize("family", SERVABLE_FAMILIES)
def test_servable_families_are_not_refused(family: str) -> None:
    config = tiny_config(family)
    assert refusal(config) is None
    assert has_recurrent_layers(config) == (family in HYBRID_FAMILIES)
    lengths = {"llama_dynamic_rope": 8, "phi3_longrope": 4096}
    assert constant_rotary_length(config) == lengths.get(family)


def test_weights_in_a_format_that_is_not_read_are_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "aqlm", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="stored quantised as 'aqlm', which is not read"):
        check_servable(Checkpoint.open(str(tmp_path)))


def test_an_untested_family_is_served_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    warn_if_untested(checkpoint)
    assert not caplog.records
    checkpoint.config.model_type = "new_family"
    warn_if_untested(checkpoint)
    assert "new_family" in caplog.text
