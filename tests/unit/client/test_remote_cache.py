"""What stands for the KV cache: columns and rows, with and without padding."""

from __future__ import annotations

import torch

from planetserve.client.remote_cache import RemoteCache


class NoSession:
    """A session that only closes."""

    def close(self) -> None:
        pass


def cache_of(num_rows: int, num_columns: int, mask_BT: torch.Tensor | None = None) -> RemoteCache:
    cache = RemoteCache(NoSession(), keep_session=True)
    cache.commit(num_rows, num_columns, mask_BT)
    return cache


def test_without_padding_every_column_is_a_token() -> None:
    cache = cache_of(2, 5)
    cache.commit(2, 1, None)
    assert not cache.is_padded
    assert (cache.get_seq_length(), cache.row_lengths()) == (6, (6, 6))
    cache.crop(-2)
    assert (cache.get_seq_length(), cache.row_lengths()) == (4, (4, 4))
    cache.crop(3)
    assert cache.row_lengths() == (3, 3)
    cache.crop(10)
    assert cache.row_lengths() == (3, 3)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert (cache.row_lengths(), cache.reorder) == ((3, 3), (1, 1))


def test_padding_is_counted_as_columns_and_not_as_tokens() -> None:
    cache = cache_of(2, 3, torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool))
    cache.commit(2, 1, None)
    assert cache.is_padded
    assert (cache.get_seq_length(), cache.row_lengths()) == (4, (3, 4))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.row_lengths() == (4, 3)
    cache.crop(1)
    assert (cache.get_seq_length(), cache.row_lengths()) == (1, (1, 0))


def test_padding_may_come_after_columns_without_any() -> None:
    cache = cache_of(2, 2)
    cache.commit(2, 1, torch.tensor([[True], [False]]))
    assert (cache.get_seq_length(), cache.row_lengths()) == (3, (3, 2))


def test_a_reset_keeps_the_rows() -> None:
    cache = cache_of(2, 3, torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool))
    cache.reset()
    assert (cache.num_rows, cache.row_lengths()) == (2, (0, 0))
    cache.commit(2, 2, None)
    assert (cache.row_lengths(), cache.is_padded) == ((2, 2), False)
