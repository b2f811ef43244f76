"""Lines and tables of the model card, from records to Markdown. Called by `moderation.card` alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from moderation.goals import Figure
from moderation.metrics import Share
from moderation.report import CheckListReport, Example, FileReport, OrdinaryReport, PresetReport
from moderation.robustness import RobustnessReport

__all__ = [
    "category_table",
    "check_list_line",
    "example_lines",
    "figure_line",
    "group_tables",
    "learnt_from",
    "number",
    "ordinary_line",
    "percent",
    "preset_line",
    "robustness_table",
    "test_lines",
]

# How the rows of a source came about, by the part of its name before a colon.
MADE_ROWS: Mapping[str, str] = {
    "hidden": "harmful requests hidden in harmless passages",
    "labelled": "requests that we labelled ourselves",
    "passage": "passages of books and answers, harmless",
}
POSTS: Mapping[str, str] = {
    "cold": "posts, Chinese",
    "davidson_tweets": "tweets, English",
    "vicomtech_stormfront": "forum posts, English",
}
MIN_GROUP_ROWS = 5
ENGLISH_REQUESTS = ("advbench", "dangerousqa", "harmbench", "harmfulqa", "strongreject")


def figure_line(figure: Figure) -> str:
    counted = figure.counted
    shown = _in_unit(figure, figure.value)
    if counted is not None and counted.interval is not None:
        low, high = counted.interval
        shown += f" ({low:.1%} to {high:.1%}; {counted.hits:,} of {counted.count:,})"
    sign = "≤" if figure.is_upper_bound else "≥"
    goal = "" if figure.goal is None else f"{sign} {_in_unit(figure, figure.goal)}"
    verdict = {None: "", True: "met", False: "**missed**"}[figure.is_met]
    return f"| {figure.about} | {shown} | {goal} | {verdict} |"


def ordinary_line(report: OrdinaryReport) -> str:
    return (
        f"| {report.name} | {report.rows:,} | {report.flagged} | {report.ordinary:,} | {report.ordinary_flagged} "
        f"| {report.false_positive_rate:.2%} | {report.meant_as_harmful} | {report.meant_as_harmful_flagged} |"
    )


def check_list_line(report: CheckListReport) -> str:
    wrong = len(report.wrong)
    named = "" if not wrong else ": " + "; ".join(f"“{escaped(text)}”" for text in report.wrong)
    return f"- `moderation/data/{report.name}`: {wrong} of {report.rows} judged wrongly{named}"


def preset_line(report: PresetReport) -> str:
    return (
        f"| {report.preset} | {report.language} | {report.threshold:.4f} | {percent(report.false_positives)} "
        f"| {percent(report.recall)} |"
    )


def test_lines(report: FileReport) -> list[str]:
    lines = [(report.short_name, report.overall), *((f"- {lang}", m) for lang, m in report.by_language.items())]
    at_1_percent = [report.recall_at_1_percent, *(None for _ in report.by_language)]
    return [
        f"| {label} | {m.rows:,} | {number(m.auroc)} | {number(m.auprc)} | {number(m.recall)} | {number(m.precision)} "
        f"| {number(m.false_positive_rate)} | {number(recall)} | {number(m.calibration_error)} |"
        for (label, m), recall in zip(lines, at_1_percent, strict=True)
    ]


def category_table(tests: Sequence[FileReport]) -> str:
    """Scores of the trained categories where a test file labels them; empty if none does."""
    lines = [
        f"| {name} | {test.short_name} | {m.rows} | {m.auroc:.3f} | {m.auprc:.3f} |"
        for test in tests
        for name, m in test.category_scores.items()
    ]
    head = "| category | test file | rows that have it | AUROC | AUPRC |\n|---|---|--:|--:|--:|\n"
    about = "Category scores, each against all other rows of a file that labels it:\n\n"
    return f"\n{about}{head}{chr(10).join(lines)}\n" if lines else ""


def robustness_table(found: RobustnessReport | None) -> str:
    """Recall and false positives under each disguise, by language; empty if that was not measured."""
    if found is None or not found.results:
        return ""
    lines = [
        f"| {one.mutation or 'as it was'} | {one.language} | {_of(one.harmful_flagged, one.harmful)} "
        f"| {'' if one.mutation is None else f'{100.0 * found.lost_recall(one):.1f}'} "
        f"| {_of(one.harmless_flagged, one.harmless)} |"
        for one in found.results
    ]
    head = "| disguise | language | recall | points lost | false positives |\n|---|---|--:|--:|--:|\n"
    about = "Rows of dev under disguises, at the default threshold:\n\n"
    return f"\n{about}{head}{chr(10).join(lines)}\n"


def example_lines(examples: Sequence[Example]) -> list[str]:
    if not examples:
        return ["None was found."]
    head = ["| mistake | probability | source | category | text |", "|---|--:|---|---|---|"]
    return head + [
        f"| {one.kind} | {one.probability:.3f} | {one.source} ({one.language}) | {escaped(one.category)} "
        f"| {escaped(one.text)} |"
        for one in examples
    ]


def group_tables(report: FileReport) -> list[str]:
    """One table a file, its kinds of group below each other; none if the file has no groups."""
    kinds = (
        ("category", report.by_category),
        ("source", report.by_source),
        ("characters", report.by_length),
    )
    lines = [
        f"| {kind} | {escaped(name)} | {m.rows:,} | {number(m.recall)} | {number(m.false_positive_rate)} "
        f"| {number(m.auroc)} |"
        for kind, groups in kinds
        for name, m in groups.items()
        if m.rows >= MIN_GROUP_ROWS
    ]
    if not lines:
        return []
    head = "| by | group | rows | recall | false positives | AUROC |\n|---|---|--:|--:|--:|--:|"
    return [f"### {report.short_name}\n{head}\n" + "\n".join(lines)]


def learnt_from(rows_by_source_and_label: Mapping[str, int]) -> list[tuple[str, int, list[str]]]:
    """(what, rows, its sources) from counts by 'source label', by what."""
    rows: dict[str, int] = {}
    sources: dict[str, list[str]] = {}
    for key, count in rows_by_source_and_label.items():
        source, _, label = key.rpartition(" ")
        what = _what(source, label == "1")
        rows[what] = rows.get(what, 0) + count
        # The books of a collection are sources of their own; the collection is enough here.
        collection = source.rpartition(":")[2].partition("/")[0]
        named = sources.setdefault(what, [])
        if collection not in named:
            named.append(collection)
    return [(what, rows[what], sources[what]) for what in sorted(rows)]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def percent(share: Share) -> str:
    return "" if share.value is None else f"{share.value:.2%} of {share.count:,}"


def escaped(text: str) -> str:
    """One cell of a table, whatever the text holds: no markup, no line break, no lone surrogate."""
    printable = text.encode("utf-8", "replace").decode("utf-8")
    one_line = "".join(char if char.isprintable() else " " for char in " ".join(printable.split()))
    marks = "\\`*_[]|"
    return html.escape("".join(f"\\{char}" if char in marks else char for char in one_line), quote=False)


def _of(hits: int, count: int) -> str:
    return f"{hits / count:.3f} of {count}" if count else ""


def _in_unit(figure: Figure, value: float) -> str:
    match figure.unit:
        case "share":
            return f"{value:.1%}"
        case "area":
            return f"{value:.3f}"
        case "points":
            return f"{value:.1f} points"
        case "ms" | "MB":
            return f"{value:.1f} {figure.unit}"


def _what(source: str, is_harmful: bool) -> str:
    made, _, origin = source.partition(":")
    if origin:
        return MADE_ROWS.get(made, f"rows made from others ({made})")
    side = "harmful" if is_harmful else "harmless"
    if source.startswith("written_"):
        language = {"en": "English", "zh": "Chinese"}.get(source.split("_")[1], "both languages")
        return f"own phrases, {language}, {side}"
    if source in POSTS:
        return f"{POSTS[source]}, {'hateful or offensive' if is_harmful else 'neither hateful nor offensive'}"
    if is_harmful:
        return "harmful requests, English" if source in ENGLISH_REQUESTS else "harmful texts of other sources"
    return "ordinary and harmless requests"
