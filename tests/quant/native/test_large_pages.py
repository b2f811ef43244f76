"""Memory in large pages: what is asked of it is the same with and without them."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from quant.native.large_pages import LARGE_PAGE_BYTES, LargePages, reserve

pytestmark = pytest.mark.unit


@pytest.fixture(params=["large pages", "no such advice", "advice refused"], autouse=True)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no such advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    elif request.param == "advice refused":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)


@pytest.mark.parametrize("num_bytes", [1, LARGE_PAGE_BYTES, 3 * LARGE_PAGE_BYTES + 5])
def test_reserved_memory_is_zero_and_begins_with_a_large_page(num_bytes: int) -> None:
    reserved = reserve(num_bytes)
    assert reserved.shape == (num_bytes,)
    assert not reserved.any()
    assert reserved.ctypes.data % LARGE_PAGE_BYTES == 0
    reserved[:] = 1


def test_copies_equal_what_they_were_made_of_and_do_not_overlap() -> None:
    memory = LargePages()
    arrays: list[npt.NDArray[Any]] = [
        np.arange(count, dtype=dtype) for count in (1, 77, 4096) for dtype in (np.uint8, np.float16, np.int64)
    ]
    arrays.append(np.arange(12, dtype=np.float32).reshape(3, 4).T)
    copies = [memory.copy(array) for array in arrays]
    for array, copied in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(copied, array)
        assert copied.dtype == array.dtype
        assert copied.flags.c_contiguous
        assert copied.ctypes.data % 64 == 0


def test_an_array_larger_than_a_region_has_its_own() -> None:
    memory = LargePages()
    before = memory.copy(np.ones(10, np.uint8))
    large = memory.copy(np.full(40 * LARGE_PAGE_BYTES, 7, np.uint8))
    assert (large == 7).all()
    assert (before == 1).all()


def test_copies_outlive_what_kept_them() -> None:
    memory = LargePages()
    copied = memory.copy(np.arange(1000))
    del memory
    np.testing.assert_array_equal(copied, np.arange(1000))
