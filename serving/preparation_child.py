"""Runs `python -m serving.preparation MODEL` beside the server and passes on how far it is.

A process of its own: quantising takes minutes of every core and hundreds of megabytes that must go back afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import msgspec

from quant.errors import CheckpointError
from quant.progress import ProgressSink
from serving.child_process import child_environment, python_command
from serving.model_sources import SourceUnavailableError
from serving.models import (
    cache_directory,
    is_published,
    is_quantized,
    model_folder,
    published_directory,
    refuse_quantized,
    resolve,
)

__all__ = ["find_prepared", "find_source", "prepare_in_child"]

_STOP_TIMEOUT_S = 10.0
_LINE_LIMIT_BYTES = 1024 * 1024


class _Line(msgspec.Struct, frozen=True):
    """One line of the child's standard output: progress, or how it ended."""

    stage: str | None = None
    done: float = 0.0
    total: float = 0.0
    ready: str | None = None
    error: str | None = None
    is_unavailable: bool = False


def find_prepared(model: str) -> Path | None:
    """The directory to serve, if nothing has to be done for it. Raises CheckpointError for what cannot be a model."""
    reference = resolve(model)
    if reference.directory is not None and is_quantized(reference.directory):
        return reference.directory
    return published_directory(model_folder(cache_directory(os.environ), reference), reference)


def find_source(model: str) -> Path | None:
    """The directory of the plain weights, if it need not be fetched. Raises CheckpointError if it is quantised."""
    reference = resolve(model)
    source = reference.directory or model_folder(cache_directory(os.environ), reference) / "source"
    if reference.directory is None and not is_published(source):
        return None
    return refuse_quantized(source)


async def prepare_in_child(model: str, progress: ProgressSink, *, is_plain: bool = False) -> Path:
    """Returns the directory to serve, or with `is_plain` that of the source weights. Cancelling it stops the child.

    Raises CheckpointError with the child's reason; SourceUnavailableError where the weights could not be fetched.
    """
    child = await asyncio.create_subprocess_exec(
        *python_command("serving.preparation", *(("--plain",) if is_plain else ()), model),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_LIMIT_BYTES,
        env=child_environment(os.environ),
        start_new_session=True,  # Ctrl-C is ours: we end it
    )
    assert child.stdout is not None
    outcome: _Line | None = None
    try:
        async for raw in child.stdout:
            line = _read(raw)
            if line is not None and line.stage is not None:
                progress.update(line.stage, line.done, line.total)
            elif line is not None:
                outcome = line
        await child.wait()
    finally:
        await _stop(child)
    if outcome is None or outcome.ready is None:
        reason = outcome.error if outcome is not None else None
        refused = SourceUnavailableError if outcome is not None and outcome.is_unavailable else CheckpointError
        raise refused(reason or f"the preparation of {model} ended with exit code {child.returncode}")
    return Path(outcome.ready)


def _read(raw: bytes) -> _Line | None:
    """None for a line that is not ours: a library may print too."""
    try:
        return msgspec.json.decode(raw, type=_Line)
    except msgspec.DecodeError:
        return None


async def _stop(child: asyncio.subprocess.Process) -> None:
    """Asks it to clean up behind itself, then insists."""
    if child.returncode is not None:
        return
    child.terminate()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(child.wait(), _STOP_TIMEOUT_S)
    if child.returncode is None:
        child.kill()
        await child.wait()
