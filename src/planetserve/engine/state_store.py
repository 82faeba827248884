"""States of recurrent layers: one set for each sequence and each of its positions that is kept.

A state is never changed once it is stored. A pass works on copies that it gathers, as rows of one
tensor for all its sequences, and stores what comes out under the position where each ends. So a
pass can be repeated, a fork shares its source's states until one of both goes on, and the state
before a step is at hand when the step is taken back. Which positions are kept is the scheduler's
decision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional

from planetserve.model.span_cache import LayerKind
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk

_Tensors = list[torch.Tensor | None]


class LayerStates:
    """The states of one layer for B sequences, as transformers' cache layers have them.

    Attributes:
        convolutions: last inputs of each convolution, `[B, channels, kernel]`, the oldest first.
        recurrent: each recurrent state, `[B, ...]`.
    """

    __slots__ = ("convolutions", "recurrent")

    def __init__(self, num_states: int):
        self.convolutions: _Tensors = [None] * num_states
        self.recurrent: _Tensors = [None] * num_states

    def append_inputs(
        self, index: int, new_BCT: torch.Tensor, kernel_size: int | None
    ) -> torch.Tensor:
        """Add inputs of a convolution; returns all that it reads, kept ones first."""
        kept = self.convolutions[index]
        if kept is None:
            size = new_BCT.shape[-1] if kernel_size is None else kernel_size
            all_BCT = functional.pad(new_BCT, (max(0, size - new_BCT.shape[-1]), 0))
        else:
            size = kept.shape[-1]
            all_BCT = torch.cat([kept, new_BCT], dim=-1)
        # A copy, because layers may write into what they are given.
        self.convolutions[index] = all_BCT[..., all_BCT.shape[-1] - size :].clone()
        return all_BCT

    def replace(self, index: int, state_B: torch.Tensor) -> torch.Tensor:
        """Set a recurrent state; its dtype stays that of the first one."""
        known = self.recurrent[index]
        if known is not None:
            state_B = state_B.to(known.dtype)
        self.recurrent[index] = state_B
        return state_B

    def row(self, index: int) -> LayerStates:
        """One sequence's states, in memory of their own."""
        own = LayerStates(0)
        own.convolutions = [_row(tensor, index) for tensor in self.convolutions]
        own.recurrent = [_row(tensor, index) for tensor in self.recurrent]
        return own

    @staticmethod
    def stack(rows: Sequence[LayerStates]) -> LayerStates:
        """Copies of the states of several sequences, as rows."""
        stacked = LayerStates(0)
        stacked.convolutions = _cat([row.convolutions for row in rows])
        stacked.recurrent = _cat([row.recurrent for row in rows])
        return stacked

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        """All of them."""
        return (x for x in (*self.convolutions, *self.recurrent) if x is not None)


def _row(tensor: torch.Tensor | None, index: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    own = tensor[index : index + 1]
    # A view would keep alive what other rows, or a layer's intermediate results, take.
    return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own


def _cat(rows: Sequence[_Tensors]) -> _Tensors:
    columns = zip(*rows, strict=True)
    return [
        None if column[0] is None else torch.cat([x for x in column if x is not None])
        for column in columns
    ]


class StateStore:
    """States of all sequences in the layers of a span, of which those of `kinds` keep any."""

    def __init__(self, kinds: Sequence[LayerKind]):
        self._kinds = kinds
        self._sequences: dict[int, dict[int, dict[int, LayerStates]]] = {}
        """By sequence, position and layer."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all states; what sequences share counts once."""
        found = {
            tensor.data_ptr(): tensor.untyped_storage().nbytes()
            for positions in self._sequences.values()
            for layers in positions.values()
            for states in layers.values()
            for tensor in states.tensors
        }
        return sum(found.values())

    def prepare(self, batch: ScheduledBatch) -> None:
        """Forget and fork sequences as the batch says."""
        for sequence_id in batch.released:
            self._sequences.pop(sequence_id, None)
        for new, source in batch.forks:
            known = self._sequences.get(source, {})
            self._sequences[new] = {position: dict(layers) for position, layers in known.items()}

    def read(self, layer: int, chunks: Sequence[ScheduledChunk]) -> LayerStates:
        """Copies of a layer's states where the chunks start; all of them at 0 or none."""
        if not chunks[0].start:
            return LayerStates(self._kinds[layer].num_states)
        return LayerStates.stack(
            [self._sequences[chunk.sequence_id][chunk.start][layer] for chunk in chunks]
        )

    def write(self, layer: int, chunks: Sequence[ScheduledChunk], states: LayerStates) -> None:
        """Store a layer's states at the ends of chunks, and drop what is kept no longer."""
        for index, chunk in enumerate(chunks):
            own = states.row(index)
            positions = self._sequences.setdefault(chunk.sequence_id, {})
            positions.setdefault(chunk.end, {})[layer] = own
            for position in [p for p in positions if p not in chunk.kept_states]:
                del positions[position]


class StateAccess:
    """The part of transformers' cache interface that recurrent layers use, over a `StateStore`.

    For one pass; layers are addressed by their true index.
    """

    def __init__(self, store: StateStore, chunks: Sequence[ScheduledChunk], first_layer: int):
        self._store = store
        self._chunks = chunks
        self._first_layer = first_layer
        self._layers: dict[int, LayerStates] = {}
        self._is_new = chunks[0].start == 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A convolution's last inputs, or None before the first token."""
        return self._states(layer_idx).convolutions[state_idx]

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append to a convolution's inputs; returns those kept and the new ones."""
        return self._states(layer_idx).append_inputs(state_idx, conv_states, conv_kernel_size)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A layer's state, or None before the first token."""
        return self._states(layer_idx).recurrent[state_idx]

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Replace a layer's state."""
        return self._states(layer_idx).replace(state_idx, recurrent_states)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether the sequences have tokens before this pass."""
        return not self._is_new

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether layers keep what they would need to roll back; never."""
        return False

    def keep(self) -> None:
        """The pass has succeeded: store what its layers have made of their states."""
        for layer, states in self._layers.items():
            self._store.write(layer, self._chunks, states)

    def _states(self, layer_idx: int) -> LayerStates:
        layer = layer_idx - self._first_layer
        states = self._layers.get(layer)
        if states is None:
            states = self._layers[layer] = self._store.read(layer, self._chunks)
        return states
