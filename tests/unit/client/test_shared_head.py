"""Threads that need the head at the same moment share one product, and each gets its own rows."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from planetserve.client.shared_head import SharedHead, share_head

HIDDEN, VOCABULARY = 16, 50


class Recorder:
    """A head that can be held shut and notes how many rows each product had."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False)
        self.rows: list[int] = []
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows.append(hidden.numel() // HIDDEN)
        self.entered.set()
        self.opened.wait()
        if not torch.isfinite(hidden).all():
            raise ValueError("not finite")
        return self.linear(hidden)


def run_together(inputs: list[torch.Tensor]) -> tuple[Recorder, list[object]]:
    """The first input occupies the head until all others wait for it."""
    recorder = Recorder()
    head = SharedHead(recorder)
    results: list[object] = [None] * len(inputs)

    def ask(index: int) -> None:
        try:
            results[index] = head(inputs[index])
        except ValueError as error:
            results[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(inputs))]
    threads[0].start()
    recorder.entered.wait()
    for thread in threads[1:]:
        thread.start()
    while len(head._waiting) < len(inputs) - 1:
        threading.Event().wait(0.001)
    recorder.opened.set()
    for thread in threads:
        thread.join()
    return recorder, results


def test_calls_that_wait_are_computed_at_once() -> None:
    inputs = [torch.randn(rows, 1, HIDDEN) for rows in (1, 1, 2, 1, 3)]
    recorder, results = run_together(inputs)
    assert recorder.rows == [1, 7]
    for hidden, result in zip(inputs, results, strict=True):
        assert isinstance(result, torch.Tensor)
        assert torch.allclose(result, recorder.linear(hidden), atol=1e-6)


def test_an_error_reaches_only_the_call_that_caused_it() -> None:
    inputs = [torch.randn(1, HIDDEN) for _ in range(4)]
    inputs[2][0, 5] = float("nan")
    recorder, results = run_together(inputs)
    assert [type(result) for result in results] == [
        torch.Tensor, torch.Tensor, ValueError, torch.Tensor,
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, HIDDEN), (2, 3, HIDDEN), (1, 40, HIDDEN), (1, 0, HIDDEN)])
def test_alone_it_is_the_head(shape: tuple[int, ...]) -> None:
    recorder = Recorder()
    recorder.opened.set()
    hidden = torch.randn(shape)
    assert torch.equal(SharedHead(recorder)(hidden), recorder.linear(hidden))


def test_gradients_pass() -> None:
    recorder = Recorder()
    recorder.opened.set()
    hidden = torch.randn(1, HIDDEN, requires_grad=True)
    SharedHead(recorder)(hidden).sum().backward()
    assert torch.allclose(hidden.grad, recorder.linear.weight.sum(0)[None])


def test_a_model_without_a_head_is_left_alone() -> None:
    class Headless(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    share_head(Headless())
