"""Which sources' rows may ship in trained weights, as a licences file says: {"yes": [names], "no": [names]}.

A name that ends in * is a prefix. A source that the file does not name counts as no.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from training.errors import DataError

__all__ = ["LICENCES_NAME", "Licences", "find_licences", "is_named", "read_licences"]

LICENCES_NAME = "licences.json"
# The file lies beside the rows, or above the folders that sort them.
_LEVELS_UP = 3


@dataclass(frozen=True, slots=True)
class Licences:
    yes: tuple[str, ...]
    no: tuple[str, ...] = ()

    def judge(self, source: str) -> Literal["yes", "no", "unknown"]:
        if is_named(self.no, source):
            return "no"
        return "yes" if is_named(self.yes, source) else "unknown"


class _LicencesFile(msgspec.Struct):
    yes: list[str]
    no: list[str] = []


def find_licences(data_file: Path) -> Path | None:
    """The nearest licences file, from the data file's own folder upwards."""
    folders = data_file.resolve().parents[: _LEVELS_UP + 1]
    return next((found for folder in folders if (found := folder / LICENCES_NAME).is_file()), None)


def read_licences(path: Path) -> Licences:
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_LicencesFile)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{path} is no licences file ({error}); expected lists of sources under 'yes' and 'no'"
        ) from error
    return Licences(tuple(content.yes), tuple(content.no))


def is_named(names: Iterable[str], source: str) -> bool:
    """Whether `source` is among `names`, of which those that end in * are prefixes."""
    return any(source.startswith(name[:-1]) if name.endswith("*") else source == name for name in names)
