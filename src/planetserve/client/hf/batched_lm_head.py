"""A client's head: an `nn.Linear` that is fast with the few rows of a decode step.

Its parameters are the plain ones, and every product reads them, so whatever is done to them counts
at once. Concurrent `generate()` calls each ask for the logits of a token or two, and a product of
few rows costs about as much as one of sixteen: most of the time goes into reading the weight. So
the thread that finds the head free computes for all that have asked by then. If other threads have
called lately, it first waits a moment for them: their hidden states often arrive together, and on
a machine with few cores none of them would reach the head while it computes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import override

from planetserve.model import few_rows

_MAX_ROWS = 8
"""Calls with more rows are computed on their own: they use the processor well enough."""
_RECENT_S = 0.5
"""A thread that called within this time may call again soon."""
_MAX_WAIT_S = 0.001
"""Maximum wait for other threads' calls."""
_WAIT_SHARE = 0.33
"""Maximum wait over the time of a product."""
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
"""Other types may mean something else by a product."""


@dataclass(slots=True, eq=False)
class _Call:
    """One thread's input, and its output or error once somebody has computed it."""

    rows_ND: torch.Tensor
    output_NV: torch.Tensor | None = None
    error: Exception | None = None


class BatchedCalls:
    """Computes the calls of many threads together. A copy of it has none."""

    def __init__(self) -> None:
        self._called_s: dict[int, float] = {}
        """When each thread called last, on the monotonic clock."""
        self._waiting: list[_Call] = []
        self._arrived = threading.Condition()
        self._turn = threading.Lock()
        self._product_s = 0.0

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return BatchedCalls, ()

    def run(
        self, rows_ND: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`compute(rows_ND)`, together with what other threads ask for."""
        with self._arrived:
            self._called_s[threading.get_ident()] = time.monotonic()
            alone = len(self._called_s) == 1
        if alone and self._turn.acquire(blocking=False):
            try:
                return compute(rows_ND)
            finally:
                self._turn.release()
        call = _Call(rows_ND)
        with self._arrived:
            self._waiting.append(call)
            self._arrived.notify()
        with self._turn:
            if call.output_NV is None and call.error is None:
                calls = self._gather()
                started_s = time.monotonic()
                _compute(calls, compute)
                self._product_s = time.monotonic() - started_s
        if call.output_NV is None:
            # Whatever was wrong may have been somebody else's input.
            return compute(rows_ND)
        return call.output_NV

    def _gather(self) -> list[_Call]:
        """The calls to compute now, after a short wait for those of other recent threads."""
        now_s = time.monotonic()
        with self._arrived:
            self._called_s = {
                thread: called_s
                for thread, called_s in self._called_s.items()
                if now_s - called_s <= _RECENT_S
            }
            self._arrived.wait_for(
                lambda: len(self._waiting) >= len(self._called_s),
                timeout=min(_MAX_WAIT_S, _WAIT_SHARE * self._product_s),
            )
            calls, self._waiting = self._waiting, []
        return calls


def _compute(calls: Sequence[_Call], compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
    try:
        rows = [call.rows_ND for call in calls]
        # The output must be usable in the modes of all threads.
        with torch.inference_mode(False), torch.no_grad():
            output = compute(rows[0] if len(rows) == 1 else torch.cat(rows))
    except Exception as error:  # noqa: BLE001 - every caller gets its own
        for call in calls:
            call.error = error
        return
    start = 0
    for call in calls:
        end = start + call.rows_ND.shape[0]
        call.output_NV = output[start:end]
        start = end


class BatchedLmHead(nn.Linear):
    """The head of a model that several threads use."""

    calls: BatchedCalls
    kernel_rows: frozenset[int] = frozenset()
    """Numbers of rows that `few_rows.linear` multiplies faster than PyTorch."""

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self._is_plain(input):
            return super().forward(input)
        rows_ND = input.reshape(-1, input.shape[-1])
        if len(rows_ND) > _MAX_ROWS:
            output_NV = self._multiply(rows_ND)
        else:
            output_NV = self.calls.run(rows_ND, self._multiply)
        return output_NV.view(*input.shape[:-1], -1)

    def _multiply(self, rows_ND: torch.Tensor) -> torch.Tensor:
        if len(rows_ND) in self.kernel_rows:
            return few_rows.linear(rows_ND, self.weight, self.bias)
        return super().forward(rows_ND)

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether this is a product of plain tensors on the CPU that needs no graph."""
        weight, bias = self.weight, self.bias
        return (
            x.numel() > 0
            and x.dtype is weight.dtype
            and type(x) in _PLAIN_TENSORS
            and type(weight) in _PLAIN_TENSORS
            and x.device.type == weight.device.type == "cpu"
            and x.shape[-1] == weight.shape[1]
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not (
                torch.is_grad_enabled()
                and (
                    x.requires_grad
                    or weight.requires_grad
                    or (bias is not None and bias.requires_grad)
                )
            )
        )


def install_batched_lm_head(model: PreTrainedModel) -> None:
    """Make the head of `model`, if it is a linear layer, one that threads share."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return
    head.__class__ = BatchedLmHead
    head.calls = BatchedCalls()
    head.kernel_rows = few_rows.faster_rows(head.weight)
