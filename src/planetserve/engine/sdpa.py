"""Attention over pages with PyTorch's own operators: the reference backend, on every device.

Uses `scaled_dot_product_attention`; layers with soft-capped logits or attention sinks, which it
does not have, go through explicit matrix products with a float32 softmax. Grouped-query heads are
never repeated in memory: the query heads that share a key head are laid out as more queries of it.

Legend: B sequences in a group, H query heads, K heads of keys and values, G = H / K, T new tokens,
S keys, D width of a key, E width of a value, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from planetserve.engine.attention import AttentionOptions
from planetserve.engine.kv_cache import LayerPages
from planetserve.engine.ragged import Group, RaggedBatch

_CPU_GROUPED_KEY_BYTES = 64 * 1024
"""Size of a sequence's keys in bytes above which, on a CPU, reading in place is faster than
gathering (measured)."""
_FEW_QUERIES = 8
"""Maximum queries per key head for which, on a CPU, half-precision attention is faster and more
exact after conversion of keys and values to float32 (measured: 4 to 6 times for one query)."""
_MAX_LOGITS = 1 << 25
"""Maximum logits in memory at once; explicit products are split along the queries."""


class SdpaBackend:
    """The reference backend."""

    page_multiple = 1

    def max_grouped_context(self, device: torch.device, key_bytes: int) -> int:
        return _CPU_GROUPED_KEY_BYTES // key_bytes if device.type == "cpu" else 1 << 30

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
        groups = batch.groups(options.visibility)
        if len(groups) == 1 and isinstance(groups[0].tokens, slice):
            query = _split(query_1HTD, groups[0])
            key, value = _context(key_1KTD, value_1KTD, pages, groups[0])
            return _merge(_attend_group(query, key, value, groups[0], options))
        _, num_heads, num_tokens, _ = query_1HTD.shape
        output = query_1HTD.new_empty(1, num_tokens, num_heads, value_1KTD.shape[-1])
        attend_groups(groups, query_1HTD, key_1KTD, value_1KTD, pages, options, output)
        return output


def attend_groups(
    groups: Sequence[Group],
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    pages: LayerPages,
    options: AttentionOptions,
    output_1THE: torch.Tensor,
) -> None:
    """Fill in the outputs of the tokens of some groups."""
    for group in groups:
        key, value = _context(key_1KTD, value_1KTD, pages, group)
        part = _merge(_attend_group(_split(query_1HTD, group), key, value, group, options))
        if isinstance(group.tokens, slice):
            output_1THE[:, group.tokens] = part
        else:
            output_1THE.index_copy_(1, group.tokens, part)


def _split(query_1HTD: torch.Tensor, group: Group) -> torch.Tensor:
    """The group's queries, `[B, H, T, D]`."""
    if isinstance(group.tokens, slice):
        query = query_1HTD[:, :, group.tokens]
    else:
        query = query_1HTD.index_select(2, group.tokens)
    if group.num_chunks == 1:
        return query
    return query[0].unflatten(1, (group.num_chunks, group.num_tokens)).transpose(0, 1)


def _merge(output_BHTE: torch.Tensor) -> torch.Tensor:
    """Outputs of a group as `[1, B * T, H, E]`, contiguous: some families view them as rows."""
    return output_BHTE.transpose(1, 2).flatten(0, 1)[None].contiguous()


def _context(
    key_1KTD: torch.Tensor, value_1KTD: torch.Tensor, pages: LayerPages, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[B, K, S, D]` and values `[B, K, S, E]` that the group's tokens may see."""
    if group.is_fresh:
        return key_1KTD[:, :, group.tokens], value_1KTD[:, :, group.tokens]
    if group.slots is not None:
        return (
            pages.keys_NKD[group.slots].transpose(0, 1)[None],
            pages.values_NKD[group.slots].transpose(0, 1)[None],
        )
    gathered = []
    for pages_PSKD in (pages.keys_PSKD, pages.values_PSKD):
        rows = pages_PSKD.index_select(0, group.pages).flatten(0, 1)
        if group.keys is not None:
            rows = rows[group.keys]
        rows = rows.unflatten(0, (group.num_chunks, -1))
        gathered.append(rows.transpose(1, 2))
    return gathered[0], gathered[1]


def _attend_group(
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSE: torch.Tensor,
    group: Group,
    options: AttentionOptions,
) -> torch.Tensor:
    """Outputs `[B, H, T, E]`."""
    num_heads, num_tokens = query_BHTD.shape[1:3]
    num_kv_heads = key_BKSD.shape[1]
    mask = None if group.mask_BTS is None else group.mask_BTS[:, None]
    explicit = options.softcap is not None or options.sinks_H is not None
    if mask is None and num_tokens > 1 and not explicit:
        return F.scaled_dot_product_attention(
            query_BHTD,
            key_BKSD,
            value_BKSE,
            is_causal=True,
            scale=options.scaling,
            enable_gqa=num_heads != num_kv_heads,
        )
    if mask is None and num_tokens > 1:
        mask = _causal(num_tokens, query_BHTD.device)
    if explicit:
        return _explicit(query_BHTD, key_BKSD, value_BKSE, mask, options)
    shared = num_heads // num_kv_heads
    packed = query_BHTD
    if shared > 1:
        packed = query_BHTD.unflatten(1, (num_kv_heads, shared)).flatten(2, 3)
        mask = None if mask is None else mask.repeat(1, 1, shared, 1)
    if query_BHTD.device.type == "cpu" and packed.shape[2] <= _FEW_QUERIES:
        packed, key_BKSD, value_BKSE = packed.float(), key_BKSD.float(), value_BKSE.float()
    output = F.scaled_dot_product_attention(
        packed, key_BKSD, value_BKSE, attn_mask=mask, scale=options.scaling
    ).to(query_BHTD.dtype)
    return output if shared == 1 else output.unflatten(2, (shared, num_tokens)).flatten(1, 2)


def _explicit(
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSE: torch.Tensor,
    mask_B1TS: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention with soft-capped logits or sinks, some queries at a time."""
    batch, num_heads, num_tokens, width = query_BHTD.shape
    step = max(1, _MAX_LOGITS // (batch * num_heads * key_BKSD.shape[2]))
    parts = []
    for start in range(0, num_tokens, step):
        mask = None if mask_B1TS is None else mask_B1TS[:, :, start : start + step]
        query = query_BHTD[:, :, start : start + step]
        parts.append(_explicit_part(query, key_BKSD, value_BKSE, mask, options))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _explicit_part(
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSE: torch.Tensor,
    mask_B1TS: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    num_kv_heads = key_BKSD.shape[1]
    scaling = query_BHTD.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    query_BKGTD = query_BHTD.unflatten(1, (num_kv_heads, -1))
    logits = torch.matmul(query_BKGTD, key_BKSD.transpose(2, 3)[:, :, None]).float() * scaling
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    if mask_B1TS is not None:
        logits = logits.masked_fill(~mask_B1TS[:, :, None], float("-inf"))
    if options.sinks_H is None:
        weights = torch.softmax(logits, dim=-1)
    else:
        sinks = options.sinks_H.float().view(1, num_kv_heads, -1, 1, 1)
        sinks = sinks.expand(*logits.shape[:-1], 1)
        weights = torch.softmax(torch.cat([logits, sinks], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights.to(value_BKSE.dtype), value_BKSE[:, :, None]).flatten(1, 2)


def _causal(num_tokens: int, device: torch.device) -> torch.Tensor:
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()[None, None]
