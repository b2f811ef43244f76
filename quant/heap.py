"""How the C library keeps freed memory: large blocks given back to the system at once, where that is asked for."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Generator
from typing import Final

_M_MMAP_THRESHOLD: Final = -3  # of malloc.h
# A compromise: at 4 MB a small model's batches of activations came and went too, and 12 % of its time with page faults.
_LARGE_BYTES: Final = 16 * 10**6
# What glibc's own adaptive threshold grows to.
_USUAL_BYTES: Final = 32 * 2**20


@contextlib.contextmanager
def large_blocks_given_back() -> Generator[None]:
    """Within the block, tensors from 16 MB on lie in maps of their own, which vanish with them.

    On glibc's heap, aligned blocks of up to 32 MB that come and go beside small ones that stay do not fit into their
    own gaps: quantising left 420 MB of gaps that measuring could not use, and comparing logits grew to ten times what
    is alive. Not to be nested. With another C library nothing changes.
    """
    give_back_free_memory()
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _USUAL_BYTES)


def give_back_free_memory() -> None:
    """Every page of the heap's gaps goes back to the system: some milliseconds. With another C library nothing does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
