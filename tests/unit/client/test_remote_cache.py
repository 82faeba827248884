"""What stands for the KV cache: columns and rows, with and without padding."""

from __future__ import annotations

import torch

from planetserve.client.hf.remote_cache import RemoteCache


class NoSession:
    """A session that only closes."""

    num_steps = 0

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


def holding(rows: list[list[int]], mask: list[list[int]] | None = None) -> RemoteCache:
    cache = RemoteCache(NoSession(), keep_session=True, keep_ids=True)
    mask_BT = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    cache.commit(len(rows), len(rows[0]), mask_BT, torch.tensor(rows))
    return cache


def keep(cache: RemoteCache, rows: list[list[int]], mask: list[list[int]] | None = None) -> None:
    ids = torch.tensor(rows)
    cache.keep_common(ids, torch.ones_like(ids) if mask is None else torch.tensor(mask))


def test_of_a_text_is_kept_what_the_rows_hold() -> None:
    cache = holding([[5, 6, 7, 8]])
    keep(cache, [[5, 6, 9, 9, 9]])
    assert (cache.num_columns, cache.reorder) == (2, None)
    keep(cache, [[5, 6, 7]])
    assert cache.num_columns == 2
    keep(cache, [[5, 6]])
    assert cache.num_columns == 1  # its last token is to be fed
    keep(cache, [[4, 6]])
    assert cache.num_columns == 0


def test_rows_go_on_from_whichever_holds_most_of_their_text() -> None:
    cache = holding([[5, 6, 1, 1], [5, 6, 7, 1], [5, 6, 7, 8]])
    keep(cache, [[5, 6, 7, 8, 9], [5, 6, 7, 3, 3], [5, 6, 7, 8, 4]])
    assert (cache.num_columns, cache.reorder) == (3, (2, 1, 2))


def test_masked_columns_are_equal_whatever_their_ids_are() -> None:
    cache = holding([[0, 5, 6]], [[0, 1, 1]])
    keep(cache, [[9, 5, 6, 7]], [[0, 1, 1, 1]])
    assert (cache.num_columns, cache.row_lengths()) == (3, (2,))
    keep(cache, [[9, 5, 6, 7]], [[0, 1, 0, 1]])
    assert (cache.num_columns, cache.row_lengths()) == (2, (1,))


def test_what_is_held_may_be_fed_again() -> None:
    cache = holding([[5, 6, 7]])
    cache.feed_again()
    assert (cache.get_seq_length(), cache.num_columns) == (0, 3)
    cache.commit(1, 2, None, torch.tensor([[8, 9]]))
    assert cache.get_seq_length() == 5


def test_an_order_that_servers_have_taken_is_not_sent_again() -> None:
    cache = cache_of(2, 3)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.begin()
    assert cache.reorder == (1, 0)
    cache.session.num_steps += 1  # the step went through, but whoever waited was interrupted
    cache.begin()
    assert cache.reorder is None
