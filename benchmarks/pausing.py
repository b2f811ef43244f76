"""Stopping a process with all its children, and letting it run only while it is measured.

A server that has nothing to do may still spin or wake; on a small machine that is time of whoever is measured.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager

from benchmarks.servers import children_of

# Timers that came due while a process was stopped fire first.
SETTLE_S = 0.2


@contextmanager
def paused(pid: int) -> Generator[None]:
    """Stopped, until the end: a process that is stopped could not obey the signal to leave."""
    _signal_all(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal_all(pid, signal.SIGCONT)


@contextmanager
def awake(pid: int, settle_s: float = SETTLE_S) -> Generator[None]:
    """Lets a paused process run, and pauses it again."""
    _signal_all(pid, signal.SIGCONT)
    time.sleep(settle_s)
    try:
        yield
    finally:
        _signal_all(pid, signal.SIGSTOP)


def _signal_all(pid: int, number: signal.Signals) -> None:
    """Parents first; one that is gone needs nothing."""
    try:
        children = children_of(pid)
        os.kill(pid, number)
    except (ProcessLookupError, FileNotFoundError):
        return
    for child in children:
        _signal_all(child, number)
