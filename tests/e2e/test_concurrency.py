"""Several users at once: every answer is what its user would have got alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from planetserve import AutoDistributedModelForCausalLM
from planetserve.errors import SessionClosed
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm

GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}


def test_threads_share_one_model(model: Any, local: Any, swarm: LocalSwarm) -> None:
    generator = torch.Generator().manual_seed(11)
    prompts = [
        torch.randint(5, 90, (1, length), generator=generator) for length in (3, 40, 17, 5, 26, 9)
    ]
    expected = [local.generate(ids, **GREEDY) for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda ids: model.generate(ids, **GREEDY), prompts))
    for got, wanted in zip(answers, expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_thread_started_inside_a_session_continues_it(model: Any, local: Any) -> None:
    """The way a `TextIteratorStreamer` is used."""
    text, new = torch.tensor([[7, 9, 11]]), torch.tensor([[20, 21]])
    answers: list[torch.Tensor] = []

    def work(ids: torch.Tensor) -> None:
        answers.append(model.generate(ids, **GREEDY))

    def start_another(ids: torch.Tensor) -> None:
        run(threading.Thread(target=work, args=(ids,)))

    with model.inference_session(max_length=80) as session:
        run(threading.Thread(target=work, args=(text,)))
        run(threading.Thread(target=start_another, args=(new,)))
        position = session.position
    first = local.generate(text, **GREEDY)
    assert torch.equal(answers[0], first)
    second = local.generate(torch.cat([first, new], dim=1), **GREEDY)
    assert torch.equal(answers[1], second[:, first.shape[1] :])
    assert position == second.shape[1] - 1


def test_a_thread_that_outlives_its_session_is_told(model: Any) -> None:
    may_go_on, caught = threading.Event(), []

    def work() -> None:
        may_go_on.wait()
        try:
            model.generate(torch.tensor([[7, 9]]), **GREEDY)
        except SessionClosed as error:
            caught.append(str(error))

    with model.inference_session(max_length=80):
        thread = threading.Thread(target=work)
        thread.start()
    may_go_on.set()
    thread.join()
    assert "in which this thread was started is closed" in caught[0]


def test_sessions_of_two_threads_do_not_mix(model: Any, local: Any) -> None:
    both = threading.Barrier(3)

    def talk(start: int) -> list[torch.Tensor]:
        turns = [torch.tensor([[start, start + 1]]), torch.tensor([[start + 5]])]
        with model.inference_session(max_length=80):
            both.wait()
            got = []
            for ids in turns:
                thread_answer: list[torch.Tensor] = []
                run(
                    threading.Thread(
                        target=lambda ids=ids, to=thread_answer: to.append(
                            model.generate(ids, **GREEDY)
                        )
                    )
                )
                got += thread_answer
            both.wait()
        return got

    def alone() -> list[torch.Tensor]:
        both.wait()
        got = [model.generate(torch.tensor([[50, 51]]), **GREEDY) for _ in range(2)]
        both.wait()
        return got

    with ThreadPoolExecutor(3) as pool:
        talks = [pool.submit(talk, 10), pool.submit(talk, 30)]
        by_itself = pool.submit(alone).result()
        answers = [done.result() for done in talks]
    for start, (first, second) in zip((10, 30), answers, strict=True):
        wanted = local.generate(torch.tensor([[start, start + 1]]), **GREEDY)
        assert torch.equal(first, wanted)
        whole = torch.cat([wanted, torch.tensor([[start + 5]])], dim=1)
        assert torch.equal(second, local.generate(whole, **GREEDY)[:, wanted.shape[1] :])
    wanted = local.generate(torch.tensor([[50, 51]]), **GREEDY)
    assert all(torch.equal(got, wanted) for got in by_itself)


def run(thread: threading.Thread) -> None:
    thread.start()
    thread.join()


def test_threads_share_a_model_whose_norm_is_called_twice(tmp_path: Path) -> None:
    """nanochat's base model calls its final norm before the layers as well."""
    folder = make_tiny_checkpoint(tmp_path, "nanochat")
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [torch.arange(5 + row, 11 + 2 * row)[None] for row in range(6)]
    with (
        LocalSwarm(str(folder), ["0:4"]) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=swarm.initial_peers, torch_dtype=torch.float32
        ) as model,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        answers = list(pool.map(lambda ids: model.generate(ids, **GREEDY), prompts * 4))
    for got, ids in zip(answers, prompts * 4, strict=True):
        assert torch.equal(got, local.generate(ids, **GREEDY))
