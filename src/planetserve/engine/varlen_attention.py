"""Attention of a whole batch in one call per layer, by torch's own kernel for CUDA.

`torch.nn.attention.varlen` takes sequences of different lengths and follows page tables, so decode
steps and chunks of prompts read their keys and values in place: nothing is gathered, and there is
no mask. These facts are from torch's sources and issue tracker:

- The kernel is FlashAttention-2, whose pages hold a multiple of 256 tokens. Gathering smaller pages
  for it would read and write every key once more in each layer, which is most of what a decode
  step costs; so where this backend serves, pages are as large (`page_multiple`). A sequence then
  leaves half such a page unused on average.
- `num_splits` is always 1. Dividing a sequence's keys among several blocks of threads, which the
  kernel would choose for few and long sequences, gives wrong results with page tables
  (pytorch#194167). Without splits, the result of a sequence is also independent of the others in
  the batch.
- Half precision only, heads of up to 256 numbers, a multiple of 8, keys as wide as values. It has
  windows, but no chunks, soft-caps or sinks. Layers that it does not fit go to `SdpaBackend`.

`attention_selector` tries out whether it works on a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from planetserve.engine.attention import AttentionOptions
from planetserve.engine.kv_cache import LayerPages
from planetserve.engine.ragged import RaggedBatch
from planetserve.engine.sdpa import SdpaBackend
from planetserve.errors import ConfigError

Operator = Callable[..., torch.Tensor]
"""Takes what `torch.nn.attention.varlen.varlen_attn` takes."""

_NEEDED = {"window_size", "scale", "enable_gqa", "seqused_k", "block_table", "num_splits"}


class VarlenBackend:
    """Attention of half-precision spans on CUDA.

    Args:
        operator: by default torch's.

    Raises:
        ConfigError: the installed torch has no such operator, or it knows no page tables.
    """

    page_multiple = 256

    def __init__(self, operator: Operator | None = None) -> None:
        self._operator = operator or _torch_operator()
        self._sdpa = SdpaBackend()

    def max_grouped_context(self, device: torch.device, key_bytes: int) -> int:
        return self._sdpa.max_grouped_context(device, key_bytes)

    def serves(self, options: AttentionOptions) -> bool:
        chunk = options.visibility.chunk
        return chunk is None and options.softcap is None and options.sinks_H is None

    def attend(
        self,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        pages: LayerPages,
        batch: RaggedBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        page_size, num_kv_heads, value_width = pages.values_PSKD.shape[1:]
        _, num_heads, _, key_width = query_1HTD.shape
        if (
            not self.serves(options)
            or not fits(query_1HTD.dtype, key_width, value_width)
            or page_size % self.page_multiple
            or query_1HTD.stride(-1) != 1
        ):
            return self._sdpa.attend(query_1HTD, key_1KTD, value_1KTD, pages, batch, options)
        tables, window = batch.tables(), options.visibility.window
        output_THD = self._operator(
            query_1HTD[0].transpose(0, 1),
            pages.keys_PSKD,
            pages.values_PSKD,
            tables.offsets_M,
            tables.context_offsets_M,
            tables.max_tokens,
            tables.max_context,
            scale=options.scaling,
            # How many earlier tokens a token sees besides itself, -1 for all; and no later ones.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=num_heads != num_kv_heads,
            seqused_k=tables.contexts_B,
            block_table=tables.tables_BN,
            num_splits=1,
        )
        return output_THD[None].contiguous()  # some families view it as rows


def fits(dtype: torch.dtype, key_width: int, value_width: int) -> bool:
    """Whether the kernel takes keys and values such as these."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and key_width == value_width
        and key_width % 8 == 0
        and key_width <= 256
    )


def _torch_operator() -> Operator:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise ConfigError(f"torch {torch.__version__} is too old for varlen") from error
    missing = _NEEDED - inspect.signature(varlen_attn).parameters.keys()
    if missing:
        names = ", ".join(sorted(missing))
        raise ConfigError(f"torch {torch.__version__} is too old for varlen: no {names}")
    return varlen_attn
