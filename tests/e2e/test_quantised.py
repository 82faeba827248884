"""A swarm of quantised servers: said in the records, taken for want of others, and usable."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.testing.swarm import LocalSwarm

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
def test_a_quantised_swarm_generates(
    llama_folder: Path,
    prompt: torch.Tensor,
    quant_type: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"quant_type": quant_type}
    with (
        LocalSwarm(str(llama_folder), ["0:3", "3:6"], options) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as model,
        caplog.at_level(logging.WARNING),
    ):
        whole = model.generate(prompt, max_new_tokens=6, do_sample=False)
        assert whole.shape[1] == prompt.shape[1] + 6
        assert "quantised weights" in caplog.text
        # Decoding with the cache gives what a pass over everything gives.
        logits = model(whole[:, :-1]).logits
        assert torch.equal(logits[:, prompt.shape[1] - 1 :].argmax(-1), whole[:, prompt.shape[1] :])
