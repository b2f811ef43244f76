"""The evaluation as JSON (for machines, complete) and Markdown (to read). Neither knows where anything lies on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from quant.model_directory import DataFile, JsonValue
from training.evaluate.catalogue import CATALOGUE, GROUPS
from training.evaluate.examine import Subject
from training.evaluate.figures import BestOf
from training.evaluate.gate import Ruling
from training.evaluate.intervals import Measure

__all__ = ["Evaluation", "as_json", "as_markdown"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """old: empty without a model to compare with. left_out: questions without room in a context, by model and set."""

    model: Subject
    against: Subject | None
    judges: tuple[str, ...]
    new: Mapping[str, Measure]
    old: Mapping[str, Measure]
    perplexity_by_text: Mapping[str, Measure]
    instructions: Mapping[str, Measure]
    best_of: BestOf | None
    rulings: tuple[Ruling, ...]
    skipped: Mapping[str, str]
    left_out: Mapping[str, int]
    num_questions: Mapping[str, int]
    data: tuple[DataFile, ...]
    settings: Mapping[str, JsonValue]

    @property
    def passes(self) -> bool | None:
        """None without a gate."""
        return all(ruling.is_kept for ruling in self.rulings) if self.rulings else None


def as_json(evaluation: Evaluation) -> dict[str, JsonValue]:
    return {
        "model": _subject(evaluation.model),
        "against": None if evaluation.against is None else _subject(evaluation.against),
        "judges": list(evaluation.judges),
        "passes_gate": evaluation.passes,
        "gate": [_ruling(ruling) for ruling in evaluation.rulings],
        "measures": {name: _measure(measure) for name, measure in evaluation.new.items()},
        "measures_against": {name: _measure(measure) for name, measure in evaluation.old.items()},
        "perplexity_by_text": {name: _measure(measure) for name, measure in evaluation.perplexity_by_text.items()},
        "ifeval_by_instruction": {name: _measure(measure) for name, measure in evaluation.instructions.items()},
        "best_of": None if evaluation.best_of is None else _best_of(evaluation.best_of),
        "not_computed": dict(evaluation.skipped),
        "questions": dict(evaluation.num_questions),
        "questions_left_out": dict(evaluation.left_out),
        "data": [{"name": file.name, "sha256": file.sha256, "rows": file.rows} for file in evaluation.data],
        "settings": dict(evaluation.settings),
    }


def as_markdown(evaluation: Evaluation, plots: Sequence[str], has_pages: bool) -> str:
    against = "" if evaluation.against is None else f" against {evaluation.against.name}"
    parts = [
        f"# Evaluation of {evaluation.model.name}{against}\n",
        _facts(evaluation),
        _gate(evaluation.rulings),
        *(_table(evaluation, group) for group in GROUPS),
        _by_text(evaluation.perplexity_by_text),
        _instructions(evaluation.instructions),
        _notes(evaluation),
        "".join(f"![{name.removesuffix('.png')}](plots/{name})\n\n" for name in plots),
        "[Answers side by side](pages/index.html)\n" if has_pages else "",
    ]
    return "\n".join(part for part in parts if part)


def _facts(evaluation: Evaluation) -> str:
    subjects = [one for one in (evaluation.model, evaluation.against) if one is not None]
    lines = [f"- `{one.name}`: {one.stage or 'no manifest'}, sha256 `{one.sha256[:12]}`" for one in subjects]
    if evaluation.judges:
        lines.append(f"- judged by {' and '.join(f'`{judge}`' for judge in evaluation.judges)}")
    settings = evaluation.settings
    lines.append(
        f"- up to {settings['max_prompts']} questions a set, {settings['max_new_tokens']} new tokens, temperature "
        f"{settings['temperature']}, seed {settings['seed']}, {settings['precision']}"
    )
    lines.append("- in brackets: intervals of 95 % (Wilson for shares, bootstrap for means)")
    return "\n".join(lines) + "\n"


def _gate(rulings: Sequence[Ruling]) -> str:
    if not rulings:
        return ""
    kept = sum(ruling.is_kept for ruling in rulings)
    verdict = "may replace the old model" if kept == len(rulings) else "may not replace the old model"
    rows = "".join(
        f"| {ruling.rule.name} | {ruling.value:.4g} | {ruling.rule} | {'kept' if ruling.is_kept else '**failed**'} |\n"
        for ruling in rulings
    )
    return f"## Gate: {verdict}\n\n| rule | value | bound | |\n| --- | ---: | --- | --- |\n{rows}"


def _table(evaluation: Evaluation, group: str) -> str:
    names = [name for name, info in CATALOGUE.items() if info.group == group and name in evaluation.new]
    if not names:
        return ""
    has_old = evaluation.against is not None
    head = "| measure | new |" + (" old |" if has_old else "") + " n | |\n| --- | ---: |"
    rows = [f"{head}{' ---: |' if has_old else ''} ---: | --- |"]
    for name in names:
        info = CATALOGUE[name]
        old = f" {_cell(evaluation.old.get(name), info.is_percent)} |" if has_old else ""
        measure = evaluation.new[name]
        rows.append(f"| {name} | {_cell(measure, info.is_percent)} |{old} {measure.count} | {info.about} |")
    return f"## {group.replace('_', ' ')}\n\n" + "\n".join(rows) + "\n"


def _by_text(perplexities: Mapping[str, Measure]) -> str:
    if not perplexities:
        return ""
    rows = "".join(f"| {name} | {_cell(one, False)} | {one.count} |\n" for name, one in perplexities.items())
    return f"### Perplexity by text\n\n| text | perplexity | passages |\n| --- | ---: | ---: |\n{rows}"


def _instructions(instructions: Mapping[str, Measure]) -> str:
    if not instructions:
        return ""
    rows = "".join(f"| {name} | {_cell(one, True)} | {one.count} |\n" for name, one in instructions.items())
    return f"### IFEval by instruction (strict)\n\n| instruction | followed | n |\n| --- | ---: | ---: |\n{rows}"


def _notes(evaluation: Evaluation) -> str:
    lines = [f"- {group}: not computed, {why}" for group, why in evaluation.skipped.items()]
    lines += [f"- {where}: {count} left out, no room in the context" for where, count in evaluation.left_out.items()]
    return "## Not in these figures\n\n" + "\n".join(lines) + "\n" if lines else ""


def _cell(measure: Measure | None, is_percent: bool) -> str:
    if measure is None:
        return ""
    scale, unit = (100.0, " %") if is_percent else (1.0, "")
    value = _number(scale * measure.value)
    if measure.low is None or measure.high is None:
        return value + unit
    return f"{value}{unit} [{_number(scale * measure.low)}, {_number(scale * measure.high)}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _subject(subject: Subject) -> dict[str, JsonValue]:
    return {"name": subject.name, "sha256": subject.sha256, "stage": subject.stage}


def _measure(measure: Measure) -> dict[str, JsonValue]:
    return {field.name: getattr(measure, field.name) for field in fields(measure)}


def _ruling(ruling: Ruling) -> dict[str, JsonValue]:
    return {
        "rule": ruling.rule.name,
        "value": ruling.value,
        "min": ruling.rule.minimum,
        "max": ruling.rule.maximum,
        "kept": ruling.is_kept,
    }


def _best_of(best_of: BestOf) -> dict[str, JsonValue]:
    return {"first": list(best_of.first), "second": None if best_of.second is None else list(best_of.second)}
