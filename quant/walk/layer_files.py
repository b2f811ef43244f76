"""The work directory of a quantisation: one safetensors file for each layer, and each table of the vocabulary, that is
done, so that a run that was interrupted goes on where it stopped.

It lies beside the result, named after a fingerprint of everything that decides the codes: another source, text or
option has another one. What is in it is read back by independent code before it counts as done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from quant.errors import CheckpointError, QuantizationError
from quant.formats.autogptq import PACKED_SUFFIXES, GptqSettings, open_packed, pack_linear, unpack_linear
from quant.formats.autogptq_check import rows_of_head_parts, stored_weight
from quant.formats.autogptq_writer import packed_as_written
from quant.formats.checkpoint_format import CheckpointFormat
from quant.formats.checkpoint_names import CheckpointNames
from quant.formats.tensor_files import TensorFile, held, write_tensors
from quant.method.matrix import QuantizedMatrix, take_outputs
from quant.options import LinearChoice
from quant.walk.quantize_model import LayerReport, LinearReport
from quant.walk.tables import CodedTable

logger = logging.getLogger(__name__)

# Changes whenever the same options would make other codes, or a layer's file looks different.
WORK_VERSION: Final = 1
# Rows of a table of the vocabulary that are read back at a time.
_CHECKED_ROWS: Final = 8192
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(QuantizationError):
    """There was no space left; what is done so far is kept."""


def fingerprint(parts: Mapping[str, object]) -> str:
    """SHA-256 of what decides the codes; `parts` are plain values, as JSON holds them."""
    text = json.dumps({"version": WORK_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class WorkDirectory:
    """Quantised layers by their number. One process at a time: it holds a lock while it is open."""

    def __init__(self, path: Path, names: CheckpointNames, checkpoint_format: CheckpointFormat) -> None:
        """names, checkpoint_format: those of the result, which the layers' files have already."""
        self.path = path
        self._names = names
        self._format = checkpoint_format

    def has(self, index: int) -> bool:
        """Whether the layer is done."""
        return self._is_whole(self.file(index))

    def _is_whole(self, path: Path) -> bool:
        """A file that was cut short does not count."""
        if not path.is_file():
            return False
        try:
            TensorFile(path)
        except CheckpointError as error:
            logger.warning("layer_is_made_anew file=%s reason=%s", path.name, error)
            return False
        return True

    def file(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.safetensors"

    def num_done(self, num_layers: int) -> int:
        return sum(self.has(index) for index in range(num_layers))

    def write(self, report: LayerReport, matrices: Mapping[str, QuantizedMatrix]) -> None:
        """matrices: by our decoder's names. Raises CheckpointError if they do not read back as what they are."""
        path = self.file(report.index)
        partial = path.with_suffix(".partial")
        stored = self._names.fuse_matrices(matrices)
        tensors = [
            held(f"{name}.{part}", tensor)
            for name, matrix in stored.items()
            for part, tensor in pack_linear(matrix, self._format).items()
        ]
        write_tensors(partial, tensors, {"format": "pt", "report": json.dumps(asdict(report))})
        for name, matrix in matrices.items():
            self._require_equal(partial, name, matrix)
        partial.replace(path)

    def report(self, index: int) -> LayerReport:
        return _report_from_json(TensorFile(self.file(index)).metadata["report"])

    def matrices(self, index: int) -> dict[str, QuantizedMatrix]:
        """By our decoder's names, of a layer that is done."""
        file = TensorFile(self.file(index))
        found: dict[str, QuantizedMatrix] = {}
        for stored, choice in self.choices(index).items():
            settings = GptqSettings(choice.bits, choice.group_size, self._format)
            tensors = {suffix[1:]: file.read(stored + suffix) for suffix in PACKED_SUFFIXES}
            found.update(self._names.split_matrix(stored, unpack_linear(stored, tensors, settings)))
        return found

    def choices(self, index: int) -> dict[str, LinearChoice]:
        """Of every linear of a layer that is done, by its name in the file."""
        return {
            self._names.stored(linear.name).name: LinearChoice(linear.bits, linear.group_size)
            for linear in self.report(index).linears
        }

    def has_end(self, name: str) -> bool:
        """Whether embeddings or head are done. name: our decoder's."""
        return self._is_whole(self.end_file(name))

    def end_file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def write_end(self, report: LinearReport, matrix: QuantizedMatrix) -> None:
        """The table of the vocabulary that `report` names. Raises CheckpointError if it does not read back as it is."""
        path = self.end_file(report.name)
        partial = path.with_suffix(".partial")
        stored = self._names.stored(report.name).name
        metadata = {"format": "pt", "report": json.dumps(asdict(report))}
        write_tensors(partial, packed_as_written(stored, matrix, self._format), metadata)
        for first in range(0, matrix.out_features, _CHECKED_ROWS):
            rows = slice(first, min(first + _CHECKED_ROWS, matrix.out_features))
            weight = stored_weight(partial, stored, zero_offset=self._zero_offset, outputs=rows)
            _require_equal_weights(report.name, weight, take_outputs(matrix, rows))
        partial.replace(path)

    def end_report(self, name: str) -> LinearReport:
        return _linear_report(json.loads(TensorFile(self.end_file(name)).metadata["report"]))

    def end_choices(self, names: Iterable[str]) -> dict[str, LinearChoice]:
        """Of ends that are done, by their names in the file."""
        reports = map(self.end_report, names)
        return {self._names.stored(end.name).name: LinearChoice(end.bits, end.group_size) for end in reports}

    def end_table(self, name: str) -> CodedTable:
        """The table of an end that is done, its codes packed in memory."""
        file = TensorFile(self.end_file(name))
        stored, bits = self._names.stored(name).name, self.end_report(name).bits
        tensors = {suffix[1:]: file.read(stored + suffix) for suffix in PACKED_SUFFIXES}
        packed = open_packed(stored, tensors, GptqSettings(bits, None, self._format))
        return CodedTable(packed.matrix, packed.shape)

    @property
    def _zero_offset(self) -> int:
        return int(self._format is CheckpointFormat.V1)

    def _require_equal(self, file: Path, name: str, matrix: QuantizedMatrix) -> None:
        """Whether independent code makes of the file exactly the weight that was quantised."""
        place = self._names.stored(name)
        weight = stored_weight(file, place.name, zero_offset=self._zero_offset)
        if place.part is not None:
            weight = rows_of_head_parts(weight, place.part, self._names.head_dim)
        _require_equal_weights(name, weight, matrix)

    def within(self, name: str) -> WorkDirectory:
        """One more, in a folder of this one: it stays and goes with it, under the same lock."""
        path = self.path / name
        path.mkdir(exist_ok=True)
        return WorkDirectory(path, self._names, self._format)

    def link_others(self, others: WorkDirectory) -> None:
        """Take over what lies in `others` and not here, without a copy: what belongs to no layer."""
        for path in others.path.glob("*.safetensors"):
            if not (self.path / path.name).exists():
                (self.path / path.name).symlink_to(path.absolute())

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def open_work(
    out: Path, mark: str, names: CheckpointNames, checkpoint_format: CheckpointFormat
) -> Generator[WorkDirectory]:
    """The work directory of result `out` and fingerprint `mark`; the rest is as in WorkDirectory.

    It stays where going on makes sense: after an interruption, a full disk or anything unforeseen. It is removed when
    the block ends well, and after errors that the same command would meet again. Raises QuantizationError while
    another process works in it.
    """
    import fcntl

    path = work_path(out, mark)
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QuantizationError(f"another process is making {out} just now, in {path}; wait for it") from error
        work = WorkDirectory(path, names, checkpoint_format)
        try:
            yield work
        except DiskFullError:
            raise
        except (CheckpointError, QuantizationError):
            work.remove()
            raise
        work.remove()


def work_path(out: Path, mark: str) -> Path:
    out = out.absolute()
    return out.parent / f"{out.name}.partial-{mark[:12]}"


def other_works(out: Path, mark: str) -> Sequence[Path]:
    """Work directories that earlier runs with other options, text or source left for the same result."""
    mine = work_path(out, mark)
    return sorted(path for path in mine.parent.glob(f"{mine.name.rpartition('-')[0]}-*") if path != mine)


@contextlib.contextmanager
def full_disk_named(out: Path, work: WorkDirectory, num_layers: int) -> Generator[None]:
    """Turns "no space left" into a DiskFullError that says what is kept and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        free = shutil.disk_usage(work.path).free
        raise DiskFullError(
            f"the disk of {out.absolute().parent} is full ({free / 1e6:,.0f} MB left); nothing was written under "
            f"{out.name}. {work.num_done(num_layers)} of {num_layers} layers are kept in {work.path}: free some space "
            "and give the same command again to go on from there"
        ) from error


def _require_equal_weights(name: str, weight: NDArray[np.float32], matrix: QuantizedMatrix) -> None:
    difference = float((torch.from_numpy(weight) - matrix.dequantize()).abs().max())
    if difference != 0.0:
        raise CheckpointError(
            f"{name}: the written file does not read back as what was quantised: weights differ by up to "
            f"{difference:.2g}; nothing was published. Please report this"
        )


def _report_from_json(text: str) -> LayerReport:
    record = cast("dict[str, object]", json.loads(text))
    linears = cast("list[dict[str, object]]", record["linears"])
    return LayerReport(int(str(record["index"])), tuple(map(_linear_report, linears)))


def _linear_report(record: Mapping[str, object]) -> LinearReport:
    return LinearReport(
        name=str(record["name"]),
        bits=int(str(record["bits"])),
        group_size=int(str(record["group_size"])),
        error=float(str(record["error"])),
        damp=float(str(record["damp"])),
    )
