"""A distributed model is an ordinary module of its class, or says why not in one line."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from planetserve import AutoDistributedModel, AutoDistributedModelForCausalLM
from planetserve.errors import ConfigError
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def load(folder: Path, swarm: LocalSwarm, **options: Any) -> Any:
    """A client of its own, for a test that changes it."""
    return AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=swarm.initial_peers, torch_dtype=torch.float32, **options
    )


@pytest.fixture
def fresh(llama_folder: Path, swarm: LocalSwarm) -> Iterator[Any]:
    """A client of its own."""
    with load(llama_folder, swarm) as loaded:
        yield loaded


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for the order of additions."""
    return bool((got - expected).norm() <= 1e-4 * expected.norm())


class WithLowRank(nn.Module):
    """What LoRA makes of a head."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.head = head
        self.low_rank = nn.Linear(head.in_features, head.out_features, bias=False)
        self.low_rank.weight.data.fill_(0.125)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + self.low_rank(x)


@pytest.mark.parametrize(
    "family", ["llama", "llama_mqa_tied", "phi", "gptj", "gpt_neox", "cohere", "gemma2"]
)
def test_edits_count_as_they_do_locally(family: str, tmp_path: Path, prompt: torch.Tensor) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", family)
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def edit(model: Any) -> None:
        model.get_output_embeddings().weight.data[5] *= 30

    def wrap(model: Any) -> None:
        model.set_output_embeddings(WithLowRank(model.get_output_embeddings()))

    edits: list[Callable[[Any], object]] = [
        lambda model: model.tie_weights(),
        edit,
        lambda model: model.load_state_dict(
            {name: value * 1.01 for name, value in model.state_dict().items()}
        ),
        lambda model: model.resize_token_embeddings(104, mean_resizing=False),
        lambda model: model.get_output_embeddings().weight.data[96:].fill_(0.5),
        wrap,
    ]
    with LocalSwarm(str(folder), ["0:4"]) as swarm, load(folder, swarm) as model, torch.no_grad():
        whole = {name: value for name, value in local.state_dict().items()}
        held = model.state_dict()
        assert held.keys() < whole.keys() or held.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in held.items())
        for change in edits:
            blocks = {n: v.clone() for n, v in local.state_dict().items() if n not in held}
            for each in (local, model):
                torch.manual_seed(3)
                change(each)
            # The servers go on with the blocks as they were.
            local.load_state_dict(blocks, strict=False)
            assert close(model(prompt).logits, local(prompt).logits)
            assert torch.equal(
                model.generate(prompt, max_new_tokens=4, **GREEDY),
                local.generate(prompt, max_new_tokens=4, **GREEDY),
            )
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            model.to(dtype)
            assert model.dtype is dtype
            agree = model(prompt).logits.argmax(-1) == local(prompt).logits.argmax(-1)
            assert agree.float().mean() > 0.7


def test_a_copy_is_a_client_of_the_same_swarm(
    llama_folder: Path, swarm: LocalSwarm, local: Any, prompt: torch.Tensor
) -> None:
    model = load(llama_folder, swarm)
    expected = local.generate(prompt, max_new_tokens=4, **GREEDY)
    copied, shallow = copy.deepcopy(model), copy.copy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(copied.generate(prompt, max_new_tokens=4, **GREEDY), expected)
    assert shallow.lm_head.weight is model.lm_head.weight
    base = copy.deepcopy(copied.model)
    with torch.no_grad():
        assert close(base(prompt).last_hidden_state, local.model(prompt).last_hidden_state)
    del model, shallow, base
    gc.collect()
    assert torch.equal(copied.generate(prompt, max_new_tokens=4, **GREEDY), expected)
    copied.close()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda model, folder: model.save_pretrained(folder), "without its blocks"),
        (lambda model, folder: model.model.save_pretrained(folder), "without its blocks"),
        (lambda model, folder: type(model).from_pretrained(folder), "use AutoDistributed"),
        (lambda model, folder: model.push_to_hub("org/model"), "without its blocks"),
        (lambda model, folder: pickle.dumps(model), "cannot be pickled"),
        (lambda model, folder: torch.save(model, folder / "model.pt"), "cannot be pickled"),
    ],
)
def test_what_half_a_model_cannot_do_is_refused(
    model: Any, tmp_path: Path, ask: Callable[[Any, Path], object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        ask(model, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "config.json").exists()


def test_it_can_be_compiled(model: Any, prompt: torch.Tensor) -> None:
    """The model, what is within it, or a function around it; nothing of a call to servers is."""

    def inside(function: Any) -> Any:
        return torch.compile(function, backend="eager")

    with torch.no_grad():
        output = model(prompt, output_hidden_states=True)
        state = output.hidden_states[-1]
        assert close(inside(model)(prompt).logits, output.logits)
        assert close(inside(model.forward)(prompt).logits, output.logits)
        assert close(inside(lambda ids: 2 * model(ids).logits)(prompt), 2 * output.logits)
        assert close(inside(model.model)(prompt).last_hidden_state, state)
        assert close(inside(model.lm_head)(state), output.logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_the_usual_calls_of_a_module_work(fresh: Any, local: Any, prompt: torch.Tensor) -> None:
    expected = local.generate(prompt, max_new_tokens=3, **GREEDY)
    assert fresh.num_parameters() == sum(value.numel() for value in fresh.state_dict().values())
    assert fresh.get_memory_footprint() >= 4 * fresh.num_parameters()
    assert "lm_head" in repr(fresh)
    assert (fresh.dtype, fresh.device.type) == (torch.float32, "cpu")
    for call in (
        fresh.eval, fresh.train, fresh.cpu, fresh.float, fresh.compile,
        fresh.gradient_checkpointing_enable, fresh.eval,
        lambda: fresh.to("cpu"),
        lambda: fresh.requires_grad_(True),
        lambda: fresh.set_attn_implementation("eager"),
    ):  # fmt: skip
        call()
        assert torch.equal(fresh.generate(prompt, max_new_tokens=3, **GREEDY), expected)


def test_hidden_states_are_those_that_the_client_has(
    model: Any, local: Any, prompt: torch.Tensor, padded: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        expected = local(prompt, output_hidden_states=True).hidden_states
        got = model(prompt, output_hidden_states=True).hidden_states
        assert len(got) == len(expected) == 7
        for index in (0, -1, 6, -7):
            assert close(got[index], expected[index])
        for read in (lambda: got[3], lambda: got[-2], lambda: got[1:3], lambda: list(got)):
            with pytest.raises(ConfigError, match="stay on the servers") as error:
                read()
            assert "\n" not in str(error.value)
        assert close(model(prompt, output_hidden_states=[0, -1]).hidden_states[-1], expected[-1])
        with pytest.raises(ConfigError, match="stay on the servers"):
            model(prompt, output_hidden_states=2)
        assert model(prompt).hidden_states is None
        options = {"max_new_tokens": 3, "output_hidden_states": True, **GREEDY}
        ours = model.generate(prompt, return_dict_in_generate=True, **options).hidden_states
        theirs = local.generate(prompt, return_dict_in_generate=True, **options).hidden_states
        for step, other in zip(ours, theirs, strict=True):
            assert close(step[0], other[0])
            assert close(step[-1], other[-1])


def test_padding_is_no_silent_part_of_a_result(
    fresh: Any,
    local: Any,
    padded: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids, mask = padded["input_ids"], padded["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        # On the left the first token of a text is predicted from padding.
        for counted in (ids, labels):
            with pytest.raises(ConfigError, match="predictions made at padding") as error:
                fresh(**padded, labels=counted)
            assert "\n" not in str(error.value)
        right = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
        labels = labels.flip(1)
        assert close(fresh(**right, labels=labels).loss, local(**right, labels=labels).loss)
        assert caplog.text.count("attention_mask leaves columns out") == 1
        states = fresh(**right, output_hidden_states=True).hidden_states[-1]
        expected = local(**right, output_hidden_states=True).hidden_states[-1]
    real = right["attention_mask"].bool()
    assert close(states[real], expected[real])
    assert caplog.text.count("attention_mask leaves columns out") == 1


@pytest.mark.parametrize("name", ["output_attentions", "output_router_logits"])
def test_what_stays_on_the_servers_is_refused(model: Any, prompt: torch.Tensor, name: str) -> None:
    with pytest.raises(ConfigError, match="stay on the servers") as error:
        model(prompt, **{name: True})
    assert "\n" not in str(error.value)
    assert model(prompt).logits.shape[1] == 12


def test_gradients_through_the_swarm_are_refused(fresh: Any, prompt: torch.Tensor) -> None:
    soft = nn.Parameter(torch.full((1, 3, 32), 0.02))
    embedded = fresh.get_input_embeddings()(prompt)
    output = fresh(inputs_embeds=torch.cat([soft, embedded], dim=1))
    losses = [output.logits.sum(), fresh(prompt, labels=prompt).loss]
    fresh.requires_grad_(True)
    losses.append(fresh(prompt, labels=prompt).loss)
    for loss in losses:
        with pytest.raises(ConfigError, match="no backward pass") as error:
            loss.backward()
        assert "\n" not in str(error.value)
    assert soft.grad is None


def test_what_follows_the_blocks_can_be_trained(
    fresh: Any, local: Any, prompt: torch.Tensor
) -> None:
    reference = copy.deepcopy(local).requires_grad_(False)
    for model in (fresh, reference):
        model.lm_head.requires_grad_(True)
        model.model.norm.requires_grad_(True)
        optimizer = torch.optim.SGD([*model.lm_head.parameters(), *model.model.norm.parameters()])
        for _ in range(3):
            optimizer.zero_grad()
            model(prompt, labels=prompt).loss.backward()
            optimizer.step()
    assert close(fresh.lm_head.weight, reference.lm_head.weight)
    assert not torch.equal(fresh.lm_head.weight, local.lm_head.weight)
    assert close(fresh(prompt).logits, reference(prompt).logits)
    classifier = nn.Linear(96, 2)
    classifier(fresh(prompt).logits[:, -1].detach()).sum().backward()
    assert classifier.weight.grad is not None


def test_a_model_without_its_head_has_states_too(
    llama_folder: Path, swarm: LocalSwarm, local: Any, prompt: torch.Tensor
) -> None:
    with (
        AutoDistributedModel.from_pretrained(
            llama_folder, initial_peers=swarm.initial_peers, dtype="float32"
        ) as model,
        torch.no_grad(),
    ):
        expected = local.model(prompt, output_hidden_states=True)
        got = model(prompt, output_hidden_states=True)
        assert close(got.hidden_states[-1], expected.last_hidden_state)
        assert close(got.last_hidden_state, expected.last_hidden_state)


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    """One server with all of the packaged model."""
    with LocalSwarm("demo", ["0:8"]) as running:
        yield running


def test_a_pipeline_takes_it_without_a_word(
    demo_swarm: LocalSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    with AutoDistributedModelForCausalLM.from_pretrained(
        "demo", initial_peers=demo_swarm.initial_peers
    ) as model:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
            text = generate("A list", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        finally:
            logger.removeHandler(caplog.handler)
        assert text.startswith("A list")
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_the_readmes_example_runs_with_demo(
    demo_swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = readme.split("## Use it from Python")[1].split("```python\n")[1].split("```")[0]
    peers = next(line for line in code.splitlines() if line.startswith("peers = "))
    code = code.replace(peers, f"peers = {list(demo_swarm.initial_peers)!r}")
    exec(code, {"MODEL": "demo"})  # noqa: S102
    assert "A list comprehension is" in capsys.readouterr().out
