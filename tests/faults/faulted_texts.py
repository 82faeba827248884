"""Ways to generate a text, each with what transformers makes of it alone and moments to strike.

Prompts are long enough for several chunks, so that a fault can hit the middle of a prefill.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fault_swarm import Moment
from transformers import StoppingCriteriaList

NUM_NEW = 14
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}
STAGES: Mapping[str, tuple[int, int]] = {"prefill": (0, 2), "early": (2, 0), "late": (11, 0)}
"""Step and chunk at which a fault strikes."""
FEW_STEPS = {**STAGES, "late": (4, 0)}
"""For texts that bring several tokens in a step."""

Generate = Callable[[Any, "Material", Any], torch.Tensor]


@dataclass(frozen=True)
class Material:
    """The model in one piece, an assistant that is wrong now and then, and prompts."""

    local: Any
    assistant: Any
    prompt: torch.Tensor
    padded: dict[str, torch.Tensor]

    @staticmethod
    def of(local: Any) -> Material:
        generator = torch.Generator().manual_seed(31)
        assistant = copy.deepcopy(local)
        with torch.no_grad():
            for value in assistant.parameters():
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.01)
        assistant.generation_config.num_assistant_tokens = 3
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        ids = torch.randint(5, 90, (3, 66), generator=generator)
        mask = torch.ones_like(ids)
        for row, missing in enumerate((0, 29, 50)):
            ids[row, :missing] = 0
            mask[row, :missing] = 0
        return Material(local, assistant, ids[:1], {"input_ids": ids, "attention_mask": mask})


@dataclass(frozen=True)
class Text:
    """One way to call `generate()`."""

    generate: Generate
    stages: Mapping[str, tuple[int, int]] = field(default_factory=lambda: STAGES)

    def moment(self, stage: str, block: int) -> Moment:
        return Moment(block, *self.stages[stage])


def _simply(batch: bool = False, **options: Any) -> Generate:
    def generate(model: Any, material: Material, witness: Any) -> torch.Tensor:
        inputs = material.padded if batch else {"input_ids": material.prompt}
        torch.manual_seed(5)
        settings = {**inputs, **GREEDY, **options}
        tokens: torch.Tensor = model.generate(
            **settings, stopping_criteria=StoppingCriteriaList([witness])
        )
        return tokens

    return generate


def _looked_up(model: Any, material: Material, witness: Any) -> torch.Tensor:
    """Candidates come from the prompt, which says everything twice."""
    again = torch.cat([material.prompt[:, :40], material.prompt[:, :40]], dim=1)
    return _simply(prompt_lookup_num_tokens=3, input_ids=again)(model, material, witness)


def _assisted(model: Any, material: Material, witness: Any) -> torch.Tensor:
    return _simply(assistant_model=material.assistant)(model, material, witness)


def _conversation(model: Any, material: Material, witness: Any) -> torch.Tensor:
    """Two questions in one session; before the second, the end of the first text is taken back."""
    first, second = material.prompt[:, :50], material.prompt[:, 50:]
    options = {**GREEDY, "stopping_criteria": StoppingCriteriaList([witness])}
    kept = 51
    if model is material.local:
        told = model.generate(first, **{**options, "max_new_tokens": NUM_NEW // 2})
        whole = torch.cat([told[:, :kept], second], dim=1)
        # What was written may hold the padding token; it counts as any other.
        tokens: torch.Tensor = model.generate(
            whole, attention_mask=torch.ones_like(whole), **options
        )
        return torch.cat([told, tokens[:, kept:]], dim=1)
    with model.inference_session(max_length=128) as session:
        told = model.generate(first, **{**options, "max_new_tokens": NUM_NEW // 2})
        session.position = kept
        return torch.cat([told, model.generate(second, **options)], dim=1)


TEXTS: Mapping[str, Text] = {
    "greedy": Text(_simply()),
    "batch": Text(_simply(batch=True)),
    "beams": Text(_simply(batch=True, num_beams=3)),
    "sampling": Text(_simply(do_sample=True, top_k=20, temperature=0.8)),
    "lookup": Text(_looked_up, FEW_STEPS),
    "assisted": Text(_assisted, FEW_STEPS),
    "conversation": Text(_conversation),
}
