"""Marks and finds what the exchange of files with other tools needs; see `benchmarks/quantizer_setup.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

WORK_VARIABLE = "CAUSERIE_INTEROP"


@pytest.fixture(scope="session")
def gptqmodel() -> Path:
    return _environment("gptqmodel")


@pytest.fixture(scope="session")
def vllm() -> Path:
    return _environment("vllm")


def _environment(name: str) -> Path:
    """The Python of the environment `name`; skips where it was not set up."""
    work = os.environ.get(WORK_VARIABLE)
    if not work:
        pytest.skip(f"{WORK_VARIABLE} is not set; `python -m benchmarks.quantizer_setup WORK` makes what it names")
    python = Path(work) / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no {python}; `python -m benchmarks.quantizer_setup {work} {name}` makes it")
    return python
