"""How torch's worker threads wait in a process that quantises. Imports no torch: OpenMP reads its settings once."""

from __future__ import annotations

from collections.abc import MutableMapping


def wait_without_spinning_long(environ: MutableMapping[str, str]) -> None:
    """To be called before torch is imported. What the user has set stays.

    By default a worker spins for some 6 ms after each of torch's operators. In a walk it is mostly the turn of the
    native kernels' threads or of Python's then, which would share its core with it.
    """
    environ.setdefault("GOMP_SPINCOUNT", "20000")
    environ.setdefault("KMP_BLOCKTIME", "1")
