"""What sessions have sent, kept on the CPU so that their KV cache can be computed again.

These are the hidden states that enter the span, one for every token in the KV cache, several times
smaller than its keys and values. There are at most as many tokens as sessions have leased, and each
takes at most twice its size (`history.py`). Used by the engine thread only.
"""

from __future__ import annotations

import torch

from planetserve.history import History
from planetserve.scheduler.batch import ScheduledChunk
from planetserve.wire.step import StepTable


class KeptInputs:
    """A `History` for each open session."""

    def __init__(self) -> None:
        self._histories: dict[bytes, History] = {}
        self._token_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tokens; one that several rows share counts for each of them."""
        num_tokens = sum(sum(history.lengths) for history in self._histories.values())
        return num_tokens * self._token_bytes

    def open(self, session_id: bytes, num_rows: int) -> None:
        """Begin with empty rows."""
        self._histories[session_id] = History(num_rows)

    def forget(self, session_id: bytes) -> None:
        """Drop a session's inputs; an unknown session is ignored."""
        self._histories.pop(session_id, None)

    def start(self, session_id: bytes, table: StepTable) -> None:
        """A step reorders and cuts its rows."""
        self._histories[session_id].start(table)

    def extend(self, session_id: bytes, table: StepTable, hidden_TD: torch.Tensor) -> None:
        """A started step is done: keep its inputs."""
        self._token_bytes = hidden_TD.shape[1] * hidden_TD.itemsize
        self._histories[session_id].extend(table, hidden_TD)

    def read(self, chunk: ScheduledChunk) -> tuple[torch.Tensor, list[int]]:
        """Inputs and positions of the tokens of a chunk that are computed again."""
        end = chunk.start + chunk.num_restored
        return self._histories[chunk.session_id].read(chunk.row, chunk.start, end)
