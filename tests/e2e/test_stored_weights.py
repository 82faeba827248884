"""A swarm over a checkpoint that is stored quantised: servers keep its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.errors import ConfigError
from planetserve.testing.checkpoints import load_local
from planetserve.testing.stored_weights import make_stored_checkpoint
from planetserve.testing.swarm import LocalSwarm


@pytest.mark.parametrize(
    ("method", "family"), [("awq", "qwen3_moe"), ("mxfp4", "gpt_oss"), ("fp8_ue8m0", "qwen3_5_moe")]
)
def test_tokens_are_those_of_the_dequantised_model(
    method: str, family: str, prompt: torch.Tensor, tmp_path: Path
) -> None:
    """One server keeps the numbers and the other dequantises them, which clients do not mind."""
    quantised, plain = make_stored_checkpoint(tmp_path, method, family)
    batch = torch.cat([prompt, prompt.flip(1)])
    expected = load_local(plain).generate(batch, max_new_tokens=12, do_sample=False)
    with LocalSwarm(str(quantised), ["0:2"]) as swarm:
        swarm.add_server("2:4", quant_type="none")
        held = {server.info().quant_type for server in swarm.servers}
        assert held == {"stored", "none"}
        with AutoDistributedModelForCausalLM.from_pretrained(
            str(quantised), initial_peers=swarm.initial_peers
        ) as model:
            assert model.generate(batch, max_new_tokens=12, do_sample=False).equal(expected)


def test_a_plain_checkpoint_has_nothing_to_keep(llama_folder: Path) -> None:
    with (
        pytest.raises(ConfigError, match="is not stored quantised; leave the flag out"),
        LocalSwarm(str(llama_folder), ["0:2"], {"quant_type": "stored"}),
    ):
        pass
