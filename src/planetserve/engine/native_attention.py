"""Attention of decode steps with this project's kernels, of everything else with PyTorch's.

A step of one or a few tokens reads its keys and values straight from the pages, once and in the
order in which they lie, without gathering them and without a mask. Windows, chunks, soft-caps,
sinks and grouped-query heads are the kernel's own. Longer chunks, and layers that the kernel does
not fit, go to `SdpaBackend`.
"""

from __future__ import annotations

import torch

from planetserve.engine.attention import AttentionOptions
from planetserve.engine.kv_cache import LayerPages
from planetserve.engine.ragged import RaggedBatch
from planetserve.engine.sdpa import SdpaBackend, attend_groups
from planetserve.errors import ConfigError
from planetserve.native import library

MAX_TOKENS = 4
"""Maximum tokens of a chunk for the kernel. For longer chunks PyTorch reads the keys once for all
tokens; the kernel does not."""
_MAX_SHAPES = 64


class NativeBackend:
    """Decode attention on the CPU.

    Raises:
        ConfigError: the kernels were not compiled, or do not run on this processor.
    """

    page_multiple = 1

    def __init__(self) -> None:
        kernels = library.kernels()
        if kernels is None:
            raise ConfigError(
                "the native kernels are not there: install a C compiler and this package again, "
                "or choose --attention_backend sdpa"
            )
        self._kernels = kernels
        self._sdpa = SdpaBackend()
        self._shapes: dict[tuple[object, ...], library.AttentionShape] = {}

    def max_grouped_context(self, device: torch.device, key_bytes: int) -> int:
        return self._sdpa.max_grouped_context(device, key_bytes)

    def serves(self, options: AttentionOptions) -> bool:
        return True

    def attend(
        self,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        pages: LayerPages,
        batch: RaggedBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        if not self.fits(query_1HTD, value_1KTD.shape[-1]):
            return self._sdpa.attend(query_1HTD, key_1KTD, value_1KTD, pages, batch, options)
        _, num_heads, num_tokens, _ = query_1HTD.shape
        output = query_1HTD.new_empty(1, num_tokens, num_heads, value_1KTD.shape[-1])
        self.attend_short(query_1HTD[0].transpose(0, 1), pages, batch, options, output[0])
        if not batch.short(MAX_TOKENS).is_all:
            groups = batch.groups(options.visibility, longer_than=MAX_TOKENS)
            attend_groups(groups, query_1HTD, key_1KTD, value_1KTD, pages, options, output)
        return output

    def fits(self, query: torch.Tensor, value_width: int) -> bool:
        """Whether the kernel serves layers with queries such as these."""
        multiple = library.WIDTH_MULTIPLE
        return (
            query.device.type == "cpu"
            and query.dtype in self._kernels.dtypes
            and query.shape[-1] % multiple == 0
            and value_width % multiple == 0
            and query.stride(-1) == 1
        )

    def attend_short(
        self,
        query_THD: torch.Tensor,
        pages: LayerPages,
        batch: RaggedBatch,
        options: AttentionOptions,
        output_THE: torch.Tensor,
    ) -> None:
        """Fill in the outputs of the batch's short chunks."""
        short = batch.short(MAX_TOKENS)
        if not len(short.chunks_N4):
            return
        sinks = None if options.sinks_H is None else options.sinks_H.float().contiguous()
        shape = self.shape(query_THD, pages, options, output_THE)
        size = library.scratch_size(
            shape.heads, shape.key_width, shape.value_width, short.max_context
        )
        scratch = torch.empty(size, dtype=torch.float32)
        self._kernels.attend(
            shape, query_THD, (pages.keys_PSKD, pages.values_PSKD), short.tables,
            short.chunks_N4, sinks, scratch, output_THE,
        )  # fmt: skip

    def shape(
        self,
        query_THD: torch.Tensor,
        pages: LayerPages,
        options: AttentionOptions,
        output_THE: torch.Tensor,
    ) -> library.AttentionShape:
        """The shape that the kernel is given for these tensors."""
        visibility = options.visibility
        key = (
            *query_THD.stride(), *query_THD.shape[1:], *output_THE.stride(),
            *pages.values_PSKD.shape[1:], visibility, options.scaling, options.softcap,
        )  # fmt: skip
        found = self._shapes.get(key)
        if found is None:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            width = query_THD.shape[-1]
            _, page_size, num_kv_heads, value_width = pages.values_PSKD.shape
            found = self._shapes[key] = library.AttentionShape(
                query_token=query_THD.stride(0), query_head=query_THD.stride(1),
                output_token=output_THE.stride(0), output_head=output_THE.stride(1),
                heads=query_THD.shape[1], kv_heads=num_kv_heads,
                key_width=width, value_width=value_width, page_size=page_size,
                window=visibility.window or 0, chunk=visibility.chunk or 0,
                scale=width**-0.5 if options.scaling is None else options.scaling,
                softcap=options.softcap or 0.0,
            )  # fmt: skip
        return found
