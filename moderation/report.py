"""The records of an evaluation, as `report.json` beside the weights holds them. No measuring and no rendering here.

`moderation.evaluate` fills them; the model card, the plots and the gate before replacing weights read them. Fields that
an older report lacks have defaults, so that a new model can always be compared with the one it would replace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from moderation.errors import ModerationError
from moderation.latency import Latency
from moderation.metrics import CurvePoint, Measures, ReliabilityBin, Share
from moderation.presets import Language, PresetName
from moderation.robustness import RobustnessReport

__all__ = [
    "CARD_FILE",
    "REPORT_FILE",
    "CategoryMeasures",
    "CheckListReport",
    "Example",
    "ExampleKind",
    "FileReport",
    "OrdinaryReport",
    "PresetReport",
    "Report",
    "encode_report",
    "read_report",
]

ExampleKind = Literal["false positive", "false negative"]
REPORT_FILE = "report.json"
CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True)
class CategoryMeasures:
    """How well one category's score tells its `rows` from the other rows of a file."""

    rows: int
    auroc: float
    auprc: float


@dataclass(frozen=True, slots=True)
class FileReport:
    """Groups of one kind are empty where the file knows one value only. A row of several categories counts in each."""

    name: str
    sha256: str
    overall: Measures
    by_language: dict[str, Measures]
    by_category: dict[str, Measures] = field(default_factory=dict)
    by_source: dict[str, Measures] = field(default_factory=dict)
    by_length: dict[str, Measures] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    reliability: list[ReliabilityBin] = field(default_factory=list)
    recall_at_1_percent: float | None = None
    category_scores: dict[str, CategoryMeasures] = field(default_factory=dict)

    @property
    def short_name(self) -> str:
        return self.name.removeprefix("moderation/").removesuffix(".jsonl.gz")


@dataclass(frozen=True, slots=True)
class OrdinaryReport:
    """First turns of one validation file.

    `meant_as_harmful` are the rows of sources whose prompts ask for harm by design; the others are ordinary, and a flag
    on one of them is a false positive. `by_language` and `by_source` count flags on the ordinary ones.
    """

    name: str
    rows: int
    flagged: int
    ordinary: int
    ordinary_flagged: int
    meant_as_harmful: int
    meant_as_harmful_flagged: int
    ordinary_conversations_flagged_at_any_turn: int
    by_language: dict[str, Share] = field(default_factory=dict)
    by_source: dict[str, Share] = field(default_factory=dict)

    @property
    def false_positive_rate(self) -> float:
        return self.ordinary_flagged / max(1, self.ordinary)


@dataclass(frozen=True, slots=True)
class PresetReport:
    """One preset in one language: ordinary texts flagged, and harmful ones found."""

    preset: PresetName
    language: Language
    threshold: float
    false_positives: Share
    recall: Share


@dataclass(frozen=True, slots=True)
class CheckListReport:
    """One of our own lists: `wrong` are the sentences that were flagged and must pass, or passed and must not."""

    name: str
    rows: int
    wrong: list[str]


@dataclass(frozen=True, slots=True)
class Example:
    """A row that was judged wrongly. Never of a test file, and only of sources whose licence allows shipping."""

    kind: ExampleKind
    text: str
    language: str
    source: str
    category: str
    probability: float


@dataclass(frozen=True, slots=True)
class Report:
    model: str
    tests: list[FileReport]
    ordinary: list[OrdinaryReport]
    milliseconds_per_message: float
    dev: FileReport | None = None
    presets: list[PresetReport] = field(default_factory=list)
    answer_presets: list[PresetReport] = field(default_factory=list)
    check_lists: list[CheckListReport] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    robustness: RobustnessReport | None = None

    def test(self, short_name: str) -> FileReport | None:
        return next((test for test in self.tests if test.short_name == short_name), None)


def encode_report(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def read_report(path: Path) -> Report:
    """Raises ModerationError if the file is missing or is no report."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError) as error:
        cure = "write it with `causerie moderation report`"
        raise ModerationError(f"{path} cannot be used as a report ({error}); {cure}") from None
