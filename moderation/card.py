"""The model card beside the weights: words around figures that come from the manifest and the report. Pure text.

`CardFacts` is all that the card needs of the manifest; what is written to disk is `moderation.publish`'s side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moderation.card_tables import (
    category_table,
    check_list_line,
    example_lines,
    figure_line,
    group_tables,
    learnt_from,
    ordinary_line,
    preset_line,
    robustness_table,
    test_lines,
)
from moderation.corpus import MEANT_AS_HARMFUL
from moderation.goals import Figure, headline_figures
from moderation.report import FileReport, Report

__all__ = ["PICTURES", "CardFacts", "StageFacts", "render_card"]

TEXT = """\
# {model}

Says with a calibrated probability whether a text (English or Chinese) is harmful: hate, harassment, threats, requests
for help with crime or violence, self-harm, sexual content. {categories}

{stages}

## What it reaches
At the default threshold (`balanced`), with intervals of 95 %. Test files had no part in training or choosing.

| figure | measured | goal | |
|---|--:|--:|---|
{headline}

{missed}

## How it was made
`{command} --data DIR --licences {licences} --seed {seed}` on {rows:,} rows; `manifest.json` has the sources, their
counts and the data files' hashes. {removed:,} rows were left out because a validation, test or check file holds their
text. Phrases of our own are in `moderation/data/written/`, expanded by `moderation/written.py`; no test file had a part
in them. Calibrated on the dev file and on ordinary first turns. {licence_rule}

| learnt from | rows | sources |
|---|--:|---|
{learnt}

{taught}
Harmful requests in Chinese were learnt from our own phrases alone: no allowed source has any. Chinese hate was learnt
from posts whose labels are partly automatic, English hate from tweets and forum posts of before 2020.

## Whom it refuses
First turns of people who chat. Requests of {meant_as_harmful} were written to be
harmful; a flag there is no false positive, so they are also shown apart.

| file | first turns | flagged | ordinary | of them flagged | false positives | meant as harmful | of them flagged |
|---|--:|--:|--:|--:|--:|--:|--:|
{ordinary}

Whole conversations of ordinary people that meet a refusal at any turn:
{conversations}.

{check_lists}

## Presets
`moderation.input.preset` chooses one. Each is a threshold a language, chosen for a stated share of ordinary first turns
refused; here that share and the recall on the harmful requests of test_user_prompts_crossdomain.

| preset | language | threshold | ordinary refused | harmful requests found |
|---|---|--:|--:|--:|
{presets}

`moderation.output.preset` chooses one for answers. An answer is judged many times while it grows, so these have
thresholds of their own, chosen on half of some 4,000 ordinary answers of sft; here the share of the other half that is
stopped, and of the hateful passages of test_surge_toxicity (en) and test_cold (zh) as if they were answers.

| preset | language | threshold | ordinary stopped | hateful passages stopped |
|---|---|--:|--:|--:|
{answer_presets}

{pictures}

## On test files
| test file | rows | AUROC | AUPRC | recall | precision | false positives | recall at 1 % of them | calibration error |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
{tests}
{category_scores}{robustness}

## How it fails
The surest mistakes, first of every source and then the next, on dev and ordinary first turns. Only of sources that may
be shipped; none is of a test file. **These texts are offensive.**

{examples}

## What it cannot do
{limits}

## Every group of every file
Recall is empty where no row of the group is harmful, false positives where every row is. A row of several categories
counts in each; test_hatecheck's categories are what is tested (`_h` hateful, `_nh` not). Groups of fewer than 5 rows
are in `report.json` only.

{groups}
"""

LIMITS = """\
A text is judged by itself and by the conversation that it stands in, not by who says it to whom: quotation, irony,
reclaimed words and counter-speech that use hateful words are flagged more often than they should be, and harm in polite
words less often. A request in words that no training row came near passes. It knows English and Chinese; other
languages are judged by what they share with these. The data was labelled by different people for different purposes;
probabilities are calibrated on their mixture and not on any one of them. It is a first gate for a private chat, not a
judge of people, and no decision about a person should rest on it.{worst}"""

PICTURES: Mapping[str, str] = {
    "pr_curves.png": "Precision against recall on every test file, a dot where the default threshold is",
    "calibration.png": "What is said against what is so: share of harmful rows by probability",
    "by_category.png": "Recall by category at the default threshold",
    "by_length.png": "Recall and false positives by length of the text",
}

MAX_SOURCES_NAMED = 8


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One model of the cascade, in the order in which they judge. about: one sentence without a full stop."""

    name: str
    about: str
    weights_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card takes from the manifest, under the names that it has there. The rest of a manifest is ignored."""

    model: str
    licences: str
    seed: int
    rows: int
    rows_by_source_and_label: dict[str, int]
    removed_rows_known_from_validation_or_test: dict[str, int] = field(default_factory=dict)
    stages: list[StageFacts] = field(default_factory=list)
    command: str = "causerie train moderation"
    trained_categories: list[str] = field(default_factory=list)
    rows_by_category: dict[str, int] = field(default_factory=dict)
    weights_bytes: int | None = None


def render_card(facts: CardFacts, report: Report, pictures: Sequence[str] = ()) -> str:
    """pictures: names of the PNGs that lie beside the card."""
    figures = headline_figures(report, facts.weights_bytes, is_cascade=len(facts.stages) > 1)
    files = [test for test in (report.dev, *report.tests) if test is not None]
    return TEXT.format(
        model=facts.model,
        categories=_categories(facts),
        stages=_stages(facts, report),
        headline="\n".join(map(figure_line, figures)),
        missed=_missed(figures),
        command=facts.command,
        licences=facts.licences,
        seed=facts.seed,
        rows=facts.rows,
        removed=sum(facts.removed_rows_known_from_validation_or_test.values()),
        licence_rule=_licence_rule(facts.licences),
        learnt="\n".join(_learnt_lines(facts)),
        taught=_taught(facts),
        meant_as_harmful=" and ".join(MEANT_AS_HARMFUL),
        ordinary="\n".join(map(ordinary_line, report.ordinary)),
        conversations=_conversations(report),
        check_lists="\n".join(map(check_list_line, report.check_lists)),
        presets="\n".join(map(preset_line, report.presets)),
        answer_presets="\n".join(map(preset_line, report.answer_presets)),
        pictures="\n\n".join(f"![{PICTURES[name]}]({name})" for name in pictures),
        tests="\n".join(line for test in files for line in test_lines(test)),
        category_scores=category_table(report.tests),
        robustness=robustness_table(report.robustness),
        examples="\n".join(example_lines(report.examples)),
        limits=LIMITS.format(worst=_worst_functions(report)),
        groups="\n\n".join(table for test in files for table in group_tables(test)),
    )


def _categories(facts: CardFacts) -> str:
    if not facts.trained_categories:
        return "One binary\ndecision; OpenAI's category names are carried by every verdict, none is trained."
    names = ", ".join(facts.trained_categories)
    return f"Beside it\nscores for {names}; every other name of OpenAI's is carried untrained."


def _stages(facts: CardFacts, report: Report) -> str:
    pace = f"About {report.milliseconds_per_message:.1f} ms of processor time a message over the test files."
    if not facts.stages:
        return pace
    if len(facts.stages) == 1:
        return f"One model: `{facts.stages[0].name}`, {_about(facts.stages[0])}. {pace}"
    lines = [f"{i}. `{stage.name}`: {_about(stage)}." for i, stage in enumerate(facts.stages, start=1)]
    about = "A cascade: a later stage judges only where those before it are unsure."
    return "\n".join([f"{about} {pace}", "", *lines])


def _about(stage: StageFacts) -> str:
    return stage.about if stage.weights_bytes is None else f"{stage.about} ({stage.weights_bytes / 1e6:.1f} MB)"


def _missed(figures: Sequence[Figure]) -> str:
    missed = [figure.about for figure in figures if figure.is_met is False]
    if not missed:
        return "Every goal is met."
    num_goals = sum(figure.goal is not None for figure in figures)
    return "\n".join([f"**{len(missed)} of {num_goals} goals are missed:**", *(f"- {about}" for about in missed)])


def _licence_rule(licences: str) -> str:
    if licences == "yes":
        return "Only sources whose licence allows shipping the weights were used (`--licences yes`)."
    return "**Sources whose licence forbids shipping the weights were used too: for experiments only.**"


def _learnt_lines(facts: CardFacts) -> Iterator[str]:
    for what, rows, sources in learnt_from(facts.rows_by_source_and_label):
        more = len(sources) - MAX_SOURCES_NAMED
        named = ", ".join(sources[:MAX_SOURCES_NAMED]) + (f" and {more} more" if more > 0 else "")
        yield f"| {what} | {rows:,} | {named} |"


def _taught(facts: CardFacts) -> str:
    if not facts.trained_categories:
        return ""
    counts = (f"{name} {facts.rows_by_category.get(name, 0):,}" for name in facts.trained_categories)
    return f"Rows that have each category: {', '.join(counts)}.\n"


def _conversations(report: Report) -> str:
    return ", ".join(
        f"{ordinary.ordinary_conversations_flagged_at_any_turn} of {ordinary.ordinary:,} in {ordinary.name}"
        for ordinary in report.ordinary
    )


def _worst_functions(report: Report) -> str:
    """The functions of HateCheck that are judged worst: each has rows of one label only, so one share says it."""
    hatecheck = report.test("test_hatecheck")
    if hatecheck is None or not hatecheck.by_category:
        return ""
    right = {name: _share_right(hatecheck, name) for name in hatecheck.by_category}
    worst = sorted(right, key=lambda name: right[name])[:3]
    named = ", ".join(f"{name} ({right[name]:.0%} right)" for name in worst)
    return f"\n\nWhat it does worst in test_hatecheck: {named}."


def _share_right(test: FileReport, category: str) -> float:
    measures = test.by_category[category]
    if measures.recall is not None:
        return measures.recall
    return 1.0 - (measures.false_positive_rate or 0.0)
