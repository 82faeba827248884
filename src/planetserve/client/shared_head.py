"""One product of the head for all threads that need it at the same moment.

Concurrent `generate()` calls each ask the head for the logits of a token or two, and a product of
few rows costs about as much as one of sixteen: most of the time goes into reading the weight. So
whoever finds the head free computes for everybody who has asked by then. Nobody waits for company.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

_MAX_ROWS = 8
"""Calls with more rows are computed on their own: they use the processor well enough."""


@dataclass(slots=True, eq=False)
class _Call:
    """One thread's input, and its output or error once somebody has computed it."""

    rows_ND: torch.Tensor
    output_NV: torch.Tensor | None = None
    error: Exception | None = None


class SharedHead:
    """A head's `forward` for many threads."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]):
        self._forward = forward
        self._waiting: list[_Call] = []
        self._waiting_lock = threading.Lock()
        self._turn = threading.Lock()

    def __call__(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        num_rows = hidden_BTD.numel() // hidden_BTD.shape[-1]
        if not 0 < num_rows <= _MAX_ROWS or hidden_BTD.requires_grad:
            return self._forward(hidden_BTD)
        call = _Call(hidden_BTD.reshape(num_rows, -1))
        with self._waiting_lock:
            self._waiting.append(call)
        with self._turn:
            if call.output_NV is None and call.error is None:
                with self._waiting_lock:
                    calls, self._waiting = self._waiting, []
                self._compute(calls)
        if call.output_NV is None:
            # Whatever was wrong may have been somebody else's input.
            return self._forward(hidden_BTD)
        return call.output_NV.view(*hidden_BTD.shape[:-1], -1)

    def _compute(self, calls: Sequence[_Call]) -> None:
        try:
            rows = [call.rows_ND for call in calls]
            output = self._forward(rows[0] if len(rows) == 1 else torch.cat(rows))
        except Exception as error:  # noqa: BLE001 - every caller gets its own
            for call in calls:
                call.error = error
            return
        start = 0
        for call in calls:
            end = start + call.rows_ND.shape[0]
            call.output_NV = output[start:end]
            start = end


def share_head(model: PreTrainedModel) -> None:
    """Let threads share the products of `model`'s head, if it is on a CPU."""
    head = model.get_output_embeddings()
    if head is not None and next(head.parameters()).device.type == "cpu":
        head.forward = SharedHead(head.forward)
