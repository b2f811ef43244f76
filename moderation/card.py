"""The model card beside the weights: fixed words around figures that come from the manifest and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moderation.evaluate import FileReport, OrdinaryReport, Report
    from moderation.train import WeightsManifest

__all__ = ["render_card"]

TEXT = """\
# {model}

Says with a calibrated probability whether a text (English or Chinese) is harmful: hate, harassment, threats, requests
for help with crime or violence, self-harm, sexual content. One binary decision; OpenAI's category names are carried by
every verdict, none is trained yet. Logistic regression over hashed word n-grams (1 to 3) and character n-grams (3 to
5), {buckets} float16 weights, numpy alone at run time, about {pace} ms a message on one core.

## How it was made
`causerie train moderation --data DIR --licences {licences} --seed {seed}` on {rows:,} rows; `manifest.json` has the
sources, their counts, the data files' hashes and how many rows were left out because a validation or test file holds
them. With `--licences yes` only sources whose licence allows shipping were used. Harmful requests in Chinese, and
frightening but harmless ones in both languages, are our own phrases (`moderation/data/written/`), expanded by
`moderation/written.py`; no test file had a part in them. Passages of books and answers are harmless rows, and some
harmful requests are also shown hidden inside such passages. Calibrated on the dev file and ordinary first turns.

## How the threshold was chosen
{threshold:.4f}, the lowest at which at most {max_rate:.1%} of the ordinary first turns of each validation file are
flagged. The source safety_tuned_refusals holds requests written to be harmful ("Outline a plan to kidnap someone."); a
flag there is no false positive, so its rows do not count for the threshold and are shown apart.

| file | first turns | flagged | ordinary | of them flagged | false positives | meant as harmful | of them flagged |
|---|--:|--:|--:|--:|--:|--:|--:|
{ordinary}

Whole conversations of ordinary people that meet a refusal at any turn: {conversations}.

## On test files
Never used for training or choosing. Recall, precision and false positives are at the threshold.

| test file | rows | AUROC | AUPRC | recall | precision | false positives | calibration error |
|---|--:|--:|--:|--:|--:|--:|--:|
{tests}

## What it cannot do
It sees words, not meaning: quotation, negation, irony and counter-speech that use hateful words are often flagged
(test_hatecheck), insults without such words are often missed (test_surge_toxicity), and a harmful request in
words that no training row used passes. Chinese harmful requests were learnt from written phrases alone. The data
was labelled by different people for different purposes; probabilities are calibrated on their mixture and not on
any one of them. It is a first gate for a private chat, not a judge of people. Operators may set
`moderation.threshold`: lower catches more and refuses more ordinary people.
"""


def render_card(manifest: WeightsManifest, report: Report) -> str:
    return TEXT.format(
        model=manifest.model,
        buckets="2^20",
        pace=f"{report.milliseconds_per_message:.1f}",
        licences=manifest.licences,
        seed=manifest.seed,
        rows=manifest.rows,
        threshold=report.threshold,
        max_rate=manifest.options["max_false_positive_rate"],
        ordinary="\n".join(map(_ordinary_line, report.ordinary)),
        conversations=", ".join(
            f"{ordinary.ordinary_conversations_flagged_at_any_turn} of {ordinary.ordinary} in {ordinary.name}"
            for ordinary in report.ordinary
        ),
        tests="\n".join(line for test in report.tests for line in _test_lines(test)),
    )


def _ordinary_line(report: OrdinaryReport) -> str:
    rate = report.false_positive_rate
    return (
        f"| {report.name} | {report.rows:,} | {report.flagged} | {report.ordinary:,} | {report.ordinary_flagged} "
        f"| {rate:.2%} | {report.meant_as_harmful} | {report.meant_as_harmful_flagged} |"
    )


def _test_lines(report: FileReport) -> list[str]:
    name = report.name.removeprefix("moderation/").removesuffix(".jsonl.gz")
    lines = [(name, report.overall), *((f"- {lang}", measures) for lang, measures in report.by_language.items())]
    figure = _figure
    return [
        f"| {label} | {m.rows:,} | {figure(m.auroc)} | {figure(m.auprc)} | {figure(m.recall)} | {figure(m.precision)} "
        f"| {figure(m.false_positive_rate)} | {figure(m.calibration_error)} |"
        for label, m in lines
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
