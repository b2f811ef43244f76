"""What can go wrong with checkpoints and quantisation. Messages say what was found, what was expected, what to do."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot do what was asked. Its message is all that the person at the terminal needs."""


class CheckpointError(Exception):
    """A model directory or weight file cannot be used."""


class QuantizationError(Exception):
    """A quantisation request cannot be carried out as asked."""
