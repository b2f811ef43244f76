"""What a quantisation run is asked to do. Plain records; parsing them is up to the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from quant.formats.checkpoint_format import CheckpointFormat
from quant.method.gptq import GptqOptions
from quant.model_directory import Parent

DEFAULT_SEQ_LEN: Final = 512


@dataclass(frozen=True, slots=True)
class LinearChoice:
    """`group_size` -1 is one group over all inputs; None the model's, as in `GptqOptions`."""

    bits: int
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """`calibration` None is the text that comes with the package. `max_perplexity_increase` in percent.

    eight_bit:     linears that get 8 bits in every layer, such as `down_proj`, whatever the others get
    choices:       bits and group size of single linears by their full names; they come before everything else
    head_bits, embedding_bits: of the tables of the vocabulary; None leaves them plain. Where the two are one table,
                   either means both
    measures_prose: whether the second held-out text is measured too, and not only the conversations
    measures_speed: whether the engine decodes for a few seconds on source and result, if they fit beside the rest
    merged_from:   base and adapter of a source that was merged for this run only: the result's parents
    checkpoint_format: the version of AutoGPTQ's layout to write
    """

    gptq: GptqOptions = field(default_factory=GptqOptions)
    eight_bit: tuple[str, ...] = ()
    calibration: Path | None = None
    samples: int = 128
    seq_len: int = DEFAULT_SEQ_LEN
    seed: int = 0
    max_perplexity_increase: float | None = None
    choices: Mapping[str, LinearChoice] = field(default_factory=dict[str, LinearChoice])
    measures_prose: bool = True
    measures_speed: bool = True
    merged_from: tuple[Parent, ...] = ()
    head_bits: int | None = None
    embedding_bits: int | None = None
    checkpoint_format: CheckpointFormat = CheckpointFormat.V1

    def bits_of(self, linear: str) -> int:
        """linear: a module's full name, such as `model.layers.0.mlp.down_proj`."""
        return self.choice_of(linear).bits

    def choice_of(self, linear: str) -> LinearChoice:
        """linear: as above."""
        if linear in self.choices:
            return self.choices[linear]
        bits = 8 if linear.rpartition(".")[2] in self.eight_bit else self.gptq.bits
        return LinearChoice(bits, self.gptq.group_size)
