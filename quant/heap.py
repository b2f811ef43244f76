"""How the C library keeps freed memory: large blocks given back to the system at once, where that is asked for."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Generator
from typing import Final

_M_MMAP_THRESHOLD: Final = -3  # of malloc.h
_LARGE_BYTES: Final = 4 * 10**6
# What glibc's own adaptive threshold grows to.
_USUAL_BYTES: Final = 32 * 2**20


@contextlib.contextmanager
def large_blocks_given_back() -> Generator[None]:
    """What is free now goes back; within the block, tensors from 4 MB on lie in maps of their own and vanish with them.

    On glibc's heap, aligned blocks of 5 to 32 MB that come and go beside small ones that stay do not fit into their own
    gaps: comparing the logits of a window after another grew to ten times what is alive. Elsewhere nothing changes.
    """
    library = ctypes.CDLL(None)
    set_option, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if set_option is None or trim is None:
        yield
        return
    trim(0)
    set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _USUAL_BYTES)
