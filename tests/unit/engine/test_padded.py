"""Padded passes: who shares one, and where it finds keys and values."""

from __future__ import annotations

from array import array

import torch
from torch import nn

from planetserve.engine.padded import PaddedBatch, Scratch, SharingLimits, shared_passes
from planetserve.model.span_blocks import KvShape
from planetserve.scheduler.batch import ScheduledChunk

PAGE_SIZE = 4
NULL_PAGE = 8
CPU = torch.device("cpu")
GENEROUS = SharingLimits(pass_tokens=10_000, max_copied=10_000)


def chunk(end: int, num_tokens: int = 1, pages: tuple[int, ...] = ()) -> ScheduledChunk:
    start = end - num_tokens
    table = array("i", pages or range(-(-end // PAGE_SIZE)))
    slots = array(
        "q",
        [table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(start, end)],
    )
    return ScheduledChunk(0, b"", 0, start, num_tokens, 0, table, slots)


def test_pieces_of_equal_length_share_a_pass():
    chunks = [chunk(9), chunk(30, 2), chunk(40), chunk(200, 200), chunk(6, 2), chunk(100, 60)]
    passes = shared_passes(chunks, GENEROUS)
    assert sorted(passes) == [[0, 2], [1, 4], [3], [5]]


def test_contexts_that_cost_more_than_a_pass_stay_alone():
    limits = SharingLimits(pass_tokens=100, max_copied=10_000)
    # Padded to 60 tokens, the one of 20 would cost 160 more than alone.
    assert shared_passes([chunk(60), chunk(20), chunk(400)], limits) == [[2], [0], [1]]
    assert shared_passes([chunk(40), chunk(20), chunk(400)], limits) == [[2], [0, 1]]
    assert shared_passes([chunk(50), chunk(50)], limits) == [[0, 1]]
    assert shared_passes([chunk(51), chunk(51)], limits) == [[0], [1]]


def test_no_pass_copies_too_much():
    limits = SharingLimits(pass_tokens=10_000, max_copied=100)
    assert shared_passes([chunk(30)] * 7, limits) == [[0, 1, 2], [3, 4, 5], [6]]
    assert shared_passes([chunk(300)], limits) == [[0]]


def test_limits_follow_the_weights():
    layer = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
    limits = SharingLimits.of([layer], [KvShape(4, 64, 64)], num_heads=4, itemsize=2)
    assert limits == (3072, 262144)
    # A sequence may be as long as makes up for one more read of the weights.
    assert limits.allow(1536, 1536, 2)
    assert not limits.allow(1537, 1537, 2)
    # For heads of queries that share keys, these are written and read once more for each.
    shape = KvShape(4, 64, 64)
    assert SharingLimits.of([layer], [shape], num_heads=6, itemsize=2).pass_tokens == 768
    # Where one layer of four caches keys, a pass of its own costs four times as much.
    assert SharingLimits.of([layer] * 4, [shape], num_heads=4, itemsize=2).pass_tokens == 4 * 3072
    assert SharingLimits.of([layer] * 4, [], num_heads=4, itemsize=2).allow(1 << 40, 1 << 40, 99)


def test_as_many_rows_as_may_be_copied():
    limits = SharingLimits(pass_tokens=200, max_copied=1000)
    assert limits.num_rows(100) == 10
    assert limits.num_rows(101) == 1


def numbered(num_heads: int) -> torch.Tensor:
    """Keys of all slots that tell slot and head; zeros in the null page."""
    tokens_NKD = 100.0 * torch.arange((NULL_PAGE + 1) * PAGE_SIZE)[:, None, None]
    tokens_NKD = (tokens_NKD + torch.arange(num_heads)[:, None] + 1).expand(-1, -1, 2).clone()
    tokens_NKD[NULL_PAGE * PAGE_SIZE :] = 0
    return tokens_NKD


def test_rows_end_together_and_begin_with_zeros():
    batch = PaddedBatch(
        [chunk(7, 2, (5, 2)), chunk(3, 2, (7,)), chunk(5, 2, (0, 1))], PAGE_SIZE, NULL_PAGE, CPU
    )
    assert (batch.num_rows, batch.num_tokens, batch.num_keys) == (3, 2, 7)
    assert batch.slots.tolist() == [9, 10, 29, 30, 3, 4]
    assert batch.mask_BS.tolist() == [[1] * 7, [0] * 4 + [1] * 3, [0] * 2 + [1] * 5]
    expected_BS = torch.tensor(
        [[20, 21, 22, 23, 8, 9, 10], [32] * 4 + [28, 29, 30], [32] * 2 + [0, 1, 2, 3, 4]]
    )
    scratch = Scratch()
    for num_heads in (1, 3, 2):
        tokens_NKD = numbered(num_heads)
        rows = batch.all_tokens(torch.empty(0), tokens_NKD, scratch)
        assert torch.equal(rows, tokens_NKD[expected_BS].transpose(1, 2))
        assert rows.is_contiguous()


def test_a_single_sequence_is_read_in_place_where_its_pages_allow():
    tokens_NKD, scratch = numbered(2), Scratch()
    batch = PaddedBatch([chunk(10, 3, (3, 4, 5))], PAGE_SIZE, NULL_PAGE, CPU)
    rows = batch.all_tokens(torch.empty(0), tokens_NKD, scratch)
    assert batch.mask_BS is None
    assert torch.equal(rows[0], tokens_NKD[12:22].transpose(0, 1))
    assert rows.data_ptr() == tokens_NKD[12].data_ptr()
    scattered = PaddedBatch([chunk(6, 3, (3, 1))], PAGE_SIZE, NULL_PAGE, CPU)
    rows = scattered.all_tokens(torch.empty(0), tokens_NKD, scratch)
    assert scattered.mask_BS is None
    assert torch.equal(rows[0], tokens_NKD[[12, 13, 14, 15, 4, 5]].transpose(0, 1))


def test_new_sequences_need_nothing_from_pages():
    new_BKTD = torch.randn(2, 2, 3, 2)
    batch = PaddedBatch([chunk(3, 3, (3,)), chunk(3, 3, (1,))], PAGE_SIZE, NULL_PAGE, CPU)
    assert batch.all_tokens(new_BKTD, numbered(2), Scratch()) is new_BKTD
    assert batch.mask_BS is None
