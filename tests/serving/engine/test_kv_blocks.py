"""The allocator's invariants, with no model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.native.large_pages import LARGE_PAGE_BYTES
from serving.engine.kv_blocks import BlockAllocator, KVCache, KVLayout, blocks_for

pytestmark = pytest.mark.unit


@given(st.lists(st.integers(min_value=0, max_value=6), max_size=40))
def test_no_block_has_two_owners_and_none_is_lost(sizes: list[int]) -> None:
    allocator = BlockAllocator(16)
    owned: list[list[int]] = []
    for size in sizes:
        if size <= allocator.num_available:
            owned.append(allocator.allocate(size))
        elif owned:
            allocator.release(owned.pop(0))
        held = [block for blocks in owned for block in blocks]
        assert len(held) == len(set(held))
        assert len(held) + allocator.num_available == 16


def test_lowest_blocks_go_first_so_memory_stays_unmapped() -> None:
    allocator = BlockAllocator(8)
    first = allocator.allocate(3)
    allocator.allocate(2)
    allocator.release(first)
    assert allocator.allocate(4) == [0, 1, 2, 5]


def test_releasing_a_block_that_nobody_holds_is_refused() -> None:
    allocator = BlockAllocator(2)
    with pytest.raises(ValueError, match="nobody holds it"):
        allocator.release([0])


def test_asking_for_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="2 available"):
        BlockAllocator(2).allocate(3)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_a_started_block_counts_whole(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_that_nobody_wrote_hold_zeros(dtype: torch.dtype) -> None:
    dirty = [torch.full((1 << 16,), torch.nan) for _ in range(8)]
    del dirty
    cache = KVCache(KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype=dtype), num_blocks=64)
    keys, values = cache.read_blocks(1, torch.arange(64).view(1, -1))
    assert keys.dtype == dtype
    assert float(keys.abs().sum() + values.abs().sum()) == 0.0
    assert cache.address % LARGE_PAGE_BYTES == 0
