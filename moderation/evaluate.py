"""What a policy is worth: measures on every test file, and how many ordinary first turns it would refuse.

Goes through `Policy`, not through the classifier, so that windows, disguises and joined turns are part of every figure.
Test files are reported on only; no example is ever taken from one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moderation.calibrate import judge_answer, ordinary_answers
from moderation.corpus import CHECK_LISTS, DEV_FILE, MEANT_AS_HARMFUL, VALIDATION_FILES, list_test_files
from moderation.examples import worst_examples
from moderation.file_figures import Judged, file_report
from moderation.latency import Latency, measure_latency, messages_of_length
from moderation.metrics import FlagArray, Share
from moderation.policy import Direction, Policy, Turn, Verdict
from moderation.presets import LANGUAGES, PRESETS, Language
from moderation.report import CheckListReport, OrdinaryReport, PresetReport, Report
from moderation.robustness import RobustnessReport, measure_robustness
from moderation.rows import (
    DataFile,
    Licences,
    Row,
    check_list,
    conversations,
    first_user_turns,
    labelled_rows,
    read_licences,
)
from quant.progress import ProgressSink

__all__ = ["evaluate_policy", "refused_conversations"]

# Harmful requests in both languages that no training source is related to.
REQUESTS_FILE = "moderation/test_user_prompts_crossdomain.jsonl.gz"
# Hateful and abusive passages, one file in each language: what no answer should hold.
PASSAGE_FILES = ("moderation/test_surge_toxicity.jsonl.gz", "moderation/test_cold_zh_indomain.jsonl.gz")
PASSAGES_PER_FILE = 1000
CHUNK_ROWS = 256
# Every row is judged once for each mutation, of which there are more than a dozen.
ROBUSTNESS_ROWS, ROBUSTNESS_SEED = 300, 0
LATENCY_TOKENS, LATENCY_MESSAGES = 64, 200


class _Judge:
    """Judges rows, and tells the progress sink how many of all texts are done."""

    def __init__(self, policy: Policy, progress: ProgressSink, total: int) -> None:
        self.policy = policy
        self._progress = progress
        self._total = total
        self._done = 0

    def rows(self, file: DataFile, rows: Sequence[Row]) -> Judged:
        # Neighbours of one length: a classifier that pads its batch to the longest text wastes little.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].text))
        found: dict[int, Verdict] = {}
        for start in range(0, len(order), CHUNK_ROWS):
            chosen = order[start : start + CHUNK_ROWS]
            found |= zip(chosen, self.policy.judge_texts([rows[i].text for i in chosen]), strict=True)
            self.advance(len(chosen))
        return Judged(file, list(rows), [found[i] for i in range(len(rows))])

    def advance(self, num_texts: int) -> None:
        self._done += num_texts
        self._progress.update("judging", self._done, self._total)


@dataclass(frozen=True, slots=True)
class _Material:
    """Everything that is judged, read before anything is, so that progress knows how much there is."""

    tests: list[tuple[DataFile, list[Row]]]
    dev: tuple[DataFile, list[Row]]
    ordinary: list[tuple[DataFile, list[Row], list[list[Turn]]]]
    check_lists: list[tuple[DataFile, list[Row]]]
    licences: Licences

    @property
    def num_texts(self) -> int:
        files = [*self.tests, self.dev, *self.check_lists]
        return sum(len(rows) for _, rows in files) + sum(2 * len(rows) for _, rows, _ in self.ordinary)


def evaluate_policy(policy: Policy, data: Path, progress: ProgressSink) -> Report:
    """Every `moderation/test_*` file, dev, our check lists and the first turns of the validation files under `data`."""
    material = _read_material(data)
    judge = _Judge(policy, progress, material.num_texts)
    began_s = time.process_time()
    tests = [judge.rows(file, rows) for file, rows in material.tests]
    spent_s = time.process_time() - began_s
    dev = judge.rows(*material.dev)
    ordinary = [judge.rows(file, rows) for file, rows, _ in material.ordinary]
    names = _trained_names(policy)
    return Report(
        model=policy.model_id,
        tests=[file_report(judged, names) for judged in tests],
        ordinary=[
            _ordinary_report(judge, judged, chats)
            for judged, (_, _, chats) in zip(ordinary, material.ordinary, strict=True)
        ],
        milliseconds_per_message=round(1000.0 * spent_s / max(1, sum(len(one.rows) for one in tests)), 3),
        dev=file_report(dev, names),
        presets=_preset_reports(policy, ordinary, [one for one in tests if one.file.name == REQUESTS_FILE]),
        answer_presets=_answer_presets(policy, data, material.tests, progress),
        check_lists=[_check_list_report(judge.rows(file, rows)) for file, rows in material.check_lists],
        robustness=_robustness(policy, material.dev[1], progress),
        examples=worst_examples(dev, ordinary, material.licences),
        latencies=[
            _latency(policy, "ordinary first turns", [rows for _, rows, _ in material.ordinary]),
            _latency(policy, "test files", [rows for _, rows in material.tests]),
        ],
    )


def refused_conversations(policy: Policy, chats: Iterable[Sequence[Turn]]) -> int:
    """How many conversations meet a refusal at one of their user turns."""
    return sum(_is_refused(policy, turns, first=0) for turns in chats)


def _is_refused(policy: Policy, turns: Sequence[Turn], first: int) -> bool:
    """At a user turn from index `first` on, each judged with all before it."""
    user_turns = (i for i, turn in enumerate(turns) if turn.role == "user" and i >= first)
    return any(policy.judge_input(turns[: i + 1]).flagged for i in user_turns)


def _read_material(data: Path) -> _Material:
    return _Material(
        tests=[_swapped(labelled_rows(data, name)) for name in list_test_files(data)],
        dev=_swapped(labelled_rows(data, DEV_FILE)),
        ordinary=[
            (*_swapped(first_user_turns(data, name)), [turns for _, turns in conversations(data, name)])
            for name in VALIDATION_FILES
        ],
        check_lists=[(DataFile(name, "", len(check_list(name))), check_list(name)) for name in CHECK_LISTS],
        licences=read_licences(data),
    )


def _swapped(read: tuple[list[Row], DataFile]) -> tuple[DataFile, list[Row]]:
    rows, file = read
    return file, rows


def _trained_names(policy: Policy) -> list[str]:
    return [*(category.value for category in policy.trained_categories), *policy.trained_extensions]


def _ordinary_report(judge: _Judge, judged: Judged, chats: Sequence[Sequence[Turn]]) -> OrdinaryReport:
    """`judged` holds the first turns; each later user turn of the ordinary ones is judged in its context."""
    is_ordinary = np.array([row.source not in MEANT_AS_HARMFUL for row in judged.rows], np.bool_)
    flagged = judged.flagged
    refused = 0
    for turns, ordinary, first_flagged in zip(chats, is_ordinary, flagged, strict=True):
        if ordinary:
            refused += bool(first_flagged) or _is_refused(judge.policy, turns, first=1)
        judge.advance(1)
    return OrdinaryReport(
        name=judged.file.name,
        rows=len(judged.rows),
        flagged=int(flagged.sum()),
        ordinary=int(is_ordinary.sum()),
        ordinary_flagged=int((flagged & is_ordinary).sum()),
        meant_as_harmful=int((~is_ordinary).sum()),
        meant_as_harmful_flagged=int((flagged & ~is_ordinary).sum()),
        ordinary_conversations_flagged_at_any_turn=refused,
        by_language=_shares(judged, is_ordinary, lambda row: row.lang),
        by_source=_shares(judged, is_ordinary, lambda row: row.source),
    )


def _shares(judged: Judged, is_counted: FlagArray, group_of: Callable[[Row], str]) -> dict[str, Share]:
    """Flagged rows among those that count, by group."""
    flags: dict[str, list[bool]] = {}
    for row, verdict, counts in zip(judged.rows, judged.verdicts, is_counted, strict=True):
        if counts:
            flags.setdefault(group_of(row), []).append(verdict.flagged)
    return {group: Share(sum(flags[group]), len(flags[group])) for group in sorted(flags)}


def _preset_reports(policy: Policy, ordinary: Sequence[Judged], requests: Sequence[Judged]) -> list[PresetReport]:
    """From the probabilities alone: a preset moves the threshold, not what was said of a text."""
    harmless = [pair for judged in ordinary for pair in judged.pairs if pair[0].source not in MEANT_AS_HARMFUL]
    harmful = [pair for judged in requests for pair in judged.pairs if pair[0].label == 1]
    return _reports_by_preset(policy, "input", _probabilities(harmless), _probabilities(harmful))


def _answer_presets(
    policy: Policy, data: Path, tests: Sequence[tuple[DataFile, list[Row]]], progress: ProgressSink
) -> list[PresetReport]:
    """Of the ordinary answers that no threshold was chosen by, and of hateful passages as if they were answers."""
    harmless = [row.text for row in ordinary_answers(data)[1::2]]
    harmful = [
        row.text
        for file, rows in tests
        if file.name in PASSAGE_FILES
        for row in [row for row in rows if row.label == 1][:PASSAGES_PER_FILE]
    ]
    found: list[tuple[Language, float]] = []
    for number, text in enumerate([*harmless, *harmful]):
        progress.update("judging answers", number, len(harmless) + len(harmful))
        found.append(judge_answer(policy, text))
    return _reports_by_preset(policy, "output", found[: len(harmless)], found[len(harmless) :])


def _probabilities(pairs: Sequence[tuple[Row, Verdict]]) -> list[tuple[Language, float]]:
    # By the language that the policy took the threshold by, not the row's.
    return [(verdict.language, verdict.probability) for _, verdict in pairs]


def _reports_by_preset(
    policy: Policy,
    direction: Direction,
    harmless: Sequence[tuple[Language, float]],
    harmful: Sequence[tuple[Language, float]],
) -> list[PresetReport]:
    return [
        PresetReport(
            preset=preset,
            language=language,
            threshold=threshold,
            false_positives=_share_above(harmless, language, threshold),
            recall=_share_above(harmful, language, threshold),
        )
        for preset in PRESETS
        for language in LANGUAGES
        for threshold in (policy.preset_threshold(preset, language, direction),)
    ]


def _share_above(found: Sequence[tuple[Language, float]], language: Language, threshold: float) -> Share:
    chosen = [probability for of_text, probability in found if of_text == language]
    return Share(sum(probability >= threshold for probability in chosen), len(chosen))


def _check_list_report(judged: Judged) -> CheckListReport:
    wrong = [row.text for row, verdict in judged.pairs if verdict.flagged != (row.label == 1)]
    return CheckListReport(judged.file.name, len(judged.rows), wrong)


def _robustness(policy: Policy, dev: Sequence[Row], progress: ProgressSink) -> RobustnessReport:
    """Of rows spread over dev, whose text comes in no order that matters."""
    chosen = dev[:: -(-len(dev) // ROBUSTNESS_ROWS)]
    progress.update("judging disguises", 0, 1)
    found = measure_robustness(policy, chosen, ROBUSTNESS_SEED)
    progress.update("judging disguises", 1, 1)
    return found


def _latency(policy: Policy, of: str, files: Sequence[Sequence[Row]]) -> Latency:
    texts = [row.text for rows in files for row in rows]
    messages = messages_of_length(texts, LATENCY_TOKENS, LATENCY_MESSAGES)
    return measure_latency(lambda message: policy.judge_texts([message]), messages, of, LATENCY_TOKENS)
