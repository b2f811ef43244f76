"""What can go wrong in training.

CommandError
└── TrainingError          settings, checkpoints and models that do not fit together
    └── DataError          a row of a data file, named by file and line
"""

from __future__ import annotations

from quant.errors import CommandError


class TrainingError(CommandError):
    """A stage cannot be run as asked."""


class DataError(TrainingError):
    """A data file holds something that the stage cannot learn from."""
