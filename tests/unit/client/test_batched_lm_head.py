"""Threads that need the head at the same moment share one product, and each gets its own rows."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planetserve.client.hf import batched_lm_head
from planetserve.client.hf.batched_lm_head import (
    BatchedCalls,
    BatchedLmHead,
    install_batched_lm_head,
)
from planetserve.model import few_rows

HIDDEN, VOCABULARY = 16, 50


class Recorder:
    """A product that can be held shut and notes how many rows each call of it had."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False)
        self.rows: list[int] = []
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(hidden))
        self.entered.set()
        self.opened.wait()
        if not torch.isfinite(hidden).all():
            raise ValueError("not finite")
        return self.linear(hidden)


def run_together(inputs: list[torch.Tensor]) -> tuple[Recorder, list[object]]:
    """The first input occupies the head until all others wait for it."""
    recorder = Recorder()
    calls = BatchedCalls()
    results: list[object] = [None] * len(inputs)

    def ask(index: int) -> None:
        try:
            results[index] = calls.run(inputs[index], recorder)
        except ValueError as error:
            results[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(inputs))]
    threads[0].start()
    recorder.entered.wait()
    for thread in threads[1:]:
        thread.start()
    while len(calls._waiting) < len(inputs) - 1:
        threading.Event().wait(0.001)
    recorder.opened.set()
    for thread in threads:
        thread.join()
    return recorder, results


def shared(bias: bool = True, dtype: torch.dtype = torch.float32) -> BatchedLmHead:
    """A head of a model, with the kernel wherever there is one."""
    torch.manual_seed(1)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype).requires_grad_(False)

    class Model(nn.Module):
        def get_output_embeddings(self) -> nn.Module:
            return head

    install_batched_lm_head(Model())
    assert isinstance(head, BatchedLmHead)
    if few_rows.has_kernel(head.weight):
        head.kernel_rows = frozenset(range(1, few_rows.MAX_ROWS + 1))
    return head


def check(head: BatchedLmHead, rows: int = 2) -> None:
    """The head gives what its parameters say."""
    x = torch.randn(1, rows, HIDDEN).to(head.weight.dtype)
    expected = F.linear(x.double(), head.weight.double())
    expected = expected if head.bias is None else expected + head.bias.double()
    error = (head(x).double() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(x.dtype).eps


def test_calls_that_wait_are_computed_at_once() -> None:
    inputs = [torch.randn(rows, HIDDEN) for rows in (1, 1, 2, 1, 3)]
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


def test_a_product_waits_for_threads_that_called_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, calls = Recorder(), BatchedCalls()
    recorder.opened.set()
    hidden = torch.randn(1, HIDDEN)

    def wait_long() -> None:
        monkeypatch.setattr(batched_lm_head, "_MAX_WAIT_S", 60.0)
        monkeypatch.setattr(batched_lm_head, "_WAIT_SHARE", 1e9)

    both_called = threading.Barrier(2, action=wait_long)

    def ask_twice() -> None:
        calls.run(hidden, recorder)
        both_called.wait()
        calls.run(hidden, recorder)

    threads = [threading.Thread(target=ask_twice) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.rows[-1] == 2

    # The two threads are gone, and nobody waits for them.
    monkeypatch.setattr(batched_lm_head, "_RECENT_S", 0.0)
    calls.run(hidden, recorder)
    assert recorder.rows[-1] == 1


@pytest.mark.parametrize(
    "shape", [(HIDDEN,), (1, HIDDEN), (2, 3, HIDDEN), (1, 40, HIDDEN), (1, 0, HIDDEN)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    head = shared(bias)
    hidden = torch.randn(shape)
    expected = F.linear(hidden, head.weight, head.bias)
    assert head(hidden).shape == expected.shape
    assert torch.allclose(head(hidden), expected, atol=1e-5)
    with pytest.raises(RuntimeError, match="shape"):
        head(torch.randn(1, HIDDEN + 1))
    with pytest.raises(RuntimeError, match="dtype"):
        head(hidden.double())


def test_gradients_pass() -> None:
    head = shared()
    hidden = torch.randn(1, HIDDEN, requires_grad=True)
    head(hidden).sum().backward()
    assert torch.allclose(hidden.grad, head.weight.sum(0)[None])
    head.requires_grad_(True)
    head(torch.ones(1, HIDDEN)).sum().backward()
    assert torch.equal(head.weight.grad, torch.ones(VOCABULARY, HIDDEN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whatever_is_done_to_its_parameters_counts_at_once(dtype: torch.dtype) -> None:
    head = shared()
    with torch.no_grad():
        for change in (
            lambda: head.weight.data[5].fill_(100.0),
            lambda: head.weight[6].mul_(3),
            lambda: head.bias.data.add_(1),
            lambda: head.weight.detach().numpy().__setitem__(7, 2.0),
            lambda: head.to(dtype),
            lambda: head.weight.mul_(2),
            lambda: head.float(),
            lambda: setattr(head, "weight", nn.Parameter(torch.randn(VOCABULARY, HIDDEN))),
            lambda: setattr(head, "weight", nn.Parameter(torch.randn(HIDDEN, VOCABULARY).t())),
            lambda: setattr(head, "bias", None),
            lambda: head.load_state_dict({"weight": torch.randn(VOCABULARY, HIDDEN)}),
        ):
            change()
            check(head, 1)
            check(head, 7)


def test_copies_are_independent() -> None:
    head = shared()
    before = head.weight.clone()
    pickled = pickle.loads(pickle.dumps(head))  # noqa: S301
    for copied in (copy.deepcopy(head), pickled):
        with torch.no_grad():
            copied.weight.mul_(2)
        check(copied)
        assert torch.equal(head.weight, before)
        assert copied.calls is not head.calls


def test_autocast_and_inference_mode_are_those_of_the_caller() -> None:
    head = shared()
    x = torch.randn(1, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).dtype is torch.bfloat16
    with torch.inference_mode():
        assert torch.allclose(head(x), F.linear(x, head.weight, head.bias), atol=1e-5)


@pytest.mark.parametrize("head", [None, type("Scaled", (nn.Linear,), {})(HIDDEN, VOCABULARY)])
def test_only_linear_heads_are_shared(head: nn.Module | None) -> None:
    class Model(nn.Module):
        def get_output_embeddings(self) -> nn.Module | None:
            return head

    before = type(head)
    install_batched_lm_head(Model())
    assert type(head) is before
