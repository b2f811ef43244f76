"""The token windows of one run: what it calibrates on and what it is measured on, with where each came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from torch import Tensor

from quant.model_directory import DataFile
from quant.options import QuantizeOptions
from quant.run.calibration import (
    BUNDLED_CALIBRATION,
    BUNDLED_HELD_OUT,
    Encoder,
    Row,
    bundled_rows,
    calibration_windows,
    encode_rows,
    held_out_windows,
    load_rows,
    refuse_overlap,
)

BUNDLED_PROSE = "held_out_prose.jsonl"
# Of each text. Half a percent of perplexity is told apart with fewer, since all models see the same windows.
HELD_OUT_TOKENS = 8_192
HELD_OUT_SEQ_LEN = 512
# Windows are spread over so many times their tokens. Of a larger file only rows drawn by the seed are tokenised, which
# saves minutes and gigabytes for one of some hundred megabytes.
SPREAD = 8


@dataclass(frozen=True, slots=True)
class HeldOut:
    """windows: (count, tokens) ids."""

    file: DataFile
    windows: Tensor


@dataclass(frozen=True, slots=True)
class RunTexts:
    """calibration: (samples, tokens) ids. `held_out` begins with the conversations."""

    calibration: Tensor
    calibration_file: DataFile
    held_out: tuple[HeldOut, ...]

    @property
    def files(self) -> tuple[DataFile, ...]:
        return (self.calibration_file, *(text.file for text in self.held_out))


def prepare_texts(encode: Encoder, options: QuantizeOptions, max_positions: int) -> RunTexts:
    """Raises QuantizationError for calibration text that is too short, cannot be read, or holds held-out text.

    max_positions: the model's context; held-out windows are not longer
    """
    names = (BUNDLED_HELD_OUT, BUNDLED_PROSE) if options.measures_prose else (BUNDLED_HELD_OUT,)
    if options.calibration is None:
        rows = bundled_rows(BUNDLED_CALIBRATION)
        calibration_file = _bundled_record(BUNDLED_CALIBRATION, rows)
    else:
        rows = load_rows(options.calibration)
        for name in names:
            refuse_overlap(rows, bundled_rows(name), str(options.calibration), name)
        digest = hashlib.sha256(options.calibration.read_bytes()).hexdigest()
        calibration_file = DataFile(options.calibration.name, digest, len(rows))
    enough = SPREAD * options.samples * options.seq_len
    ids = encode_rows(rows, encode, options.seed, enough_tokens=enough)
    return RunTexts(
        calibration=calibration_windows(ids, options.samples, options.seq_len),
        calibration_file=calibration_file,
        held_out=tuple(_held_out(name, encode, min(HELD_OUT_SEQ_LEN, max_positions)) for name in names),
    )


def _held_out(name: str, encode: Encoder, seq_len: int) -> HeldOut:
    rows = bundled_rows(name)
    windows = held_out_windows(encode_rows(rows, encode), seq_len, HELD_OUT_TOKENS)
    return HeldOut(_bundled_record(name, rows), windows)


def _bundled_record(name: str, rows: Sequence[Row]) -> DataFile:
    content = resources.files("quant").joinpath("data", name).read_bytes()
    return DataFile(name, hashlib.sha256(content).hexdigest(), len(rows))
