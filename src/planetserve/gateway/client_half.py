"""The two ends of a model that the gateway computes: embedding, and final norm with head.

Both are calls of the checkpoint's own class whose layers are elsewhere (`model/client_half.py`):
one that ends where the first layer would begin, and one that goes on where the last layer ended.
So scales, learned positions and logit soft-capping are the family's own code. Rows of many texts go
through one call. Used by one thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Self

import torch
from transformers import GenerationConfig, PreTrainedModel

from planetserve.client.hf.batched_lm_head import install_batched_lm_head
from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.client_half import load_client_half


class _Entered(Exception):
    """Carries hidden states out of a call of the model, at the place of the first layer."""

    def __init__(self, hidden_BTD: torch.Tensor):
        super().__init__()
        self.hidden_BTD = hidden_BTD


class ClientHalf:
    """A model without its layers. Made by `load`."""

    _model: PreTrainedModel

    def __init__(self, device: torch.device):
        self._device = device
        self._output_BTD: torch.Tensor | None = None
        self._takes_positions = True

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Self:
        """Read embedding, final norm and head.

        Raises:
            ModelError: they are missing or damaged, or texts of this family cannot be batched.
        """
        half = cls(device)
        model = load_client_half(checkpoint, dtype, device, remote=half._remote)
        half._model = model
        half._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        install_batched_lm_head(model)
        half._check_embedding(checkpoint)
        return half

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        size: int = self._model.get_input_embeddings().weight.shape[0]
        return size

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own."""
        return self._model.generation_config

    @property
    def max_positions(self) -> int | None:
        """The longest text that the model's configuration allows."""
        config = self._model.config.get_text_config(decoder=True)
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 1 else None

    def embed(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """What enters the first layer, `[tokens, hidden]` on the CPU, for rows of equal length that
        begin at these positions of their texts."""
        ids_BT = torch.tensor(ids, device=self._device)
        num_rows, num_tokens = ids_BT.shape
        kwargs = {}
        if self._takes_positions:
            starts_B1 = torch.tensor(starts, device=self._device)[:, None]
            kwargs["position_ids"] = starts_B1 + torch.arange(num_tokens, device=self._device)
        self._output_BTD = None
        try:
            with torch.no_grad():
                self._model(input_ids=ids_BT, use_cache=False, **kwargs)
        except _Entered as entered:
            return entered.hidden_BTD.reshape(num_rows * num_tokens, -1).cpu()
        raise ModelError("the model has not come to its layers")

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """What the head makes of outputs of the last layer: float32 `[N, vocabulary]` on the
        CPU."""
        self._output_BTD = hidden_ND[:, None].to(self._device)
        try:
            ids_N1 = torch.zeros((len(hidden_ND), 1), dtype=torch.int64, device=self._device)
            kwargs = {"position_ids": ids_N1} if self._takes_positions else {}
            with torch.no_grad():
                output = self._model(input_ids=ids_N1, use_cache=False, **kwargs)
        finally:
            self._output_BTD = None
        logits_NV: torch.Tensor = output.logits[:, 0].float().cpu()
        return logits_NV

    def _remote(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if self._output_BTD is None:
            raise _Entered(hidden_BTD)
        return self._output_BTD

    def _check_embedding(self, checkpoint: Checkpoint) -> None:
        """Refuse families whose embedding of a token depends on more than token and position."""
        ids = list(range(min(4, self.vocab_size)))
        whole_TD = self.embed([ids], [0])
        apart_TD = self.embed([[token] for token in ids], range(len(ids)))
        if not torch.allclose(whole_TD, apart_TD):
            raise ModelError(
                f"{checkpoint.name}: models of type {checkpoint.config.model_type} embed a token "
                "by more than its id and position, which the gateway cannot do for many texts at "
                "once; use generate()"
            )
