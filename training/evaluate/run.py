"""`causerie evaluate`: ask the models, judge the answers, write the report whole, and let the gate decide."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from moderation.policy import load_policy
from quant.model_directory import publish_directory
from quant.progress import BarProgress, LineProgress, ProgressSink
from training.evaluate.agenda import REPORT_NAME, Agenda, make_agenda
from training.evaluate.answers import first_answers, write_answers
from training.evaluate.examine import Findings, examine
from training.evaluate.figures import (
    Judged,
    best_of,
    checked_instructions,
    instruction_accuracy,
    judge,
    measures_alone,
    measures_of_pair,
)
from training.evaluate.gate import GateFailed, apply_rules, gate_table
from training.evaluate.intervals import Measure
from training.evaluate.judging import Scorer
from training.evaluate.pages import Page, index_html, page_html
from training.evaluate.perplexity import perplexity
from training.evaluate.plots import write_plots
from training.evaluate.reading import Contender, make_pages
from training.evaluate.report import Evaluation, as_json, as_markdown
from training.options import record_of
from training.settings import EvaluateSettings

__all__ = ["evaluate", "run"]

LoadScorer: TypeAlias = Callable[[Path], Scorer]


def run(settings: EvaluateSettings) -> None:
    """Writes OUT and prints the gate's table. Raises GateFailed if a rule is broken, TrainingError before any work."""
    for path in (settings.reward_model, settings.second_reward_model):
        if path is not None:
            check_scorer(path)
    with _progress() as progress:
        evaluation = evaluate(settings, load_scorer, progress)
    print(f"{settings.out} written: report.md, report.json, plots/, answers/, pages/", file=sys.stderr)
    if evaluation.rulings:
        print(gate_table(evaluation.rulings))
    if evaluation.passes is False:
        broken = [ruling.rule.name for ruling in evaluation.rulings if not ruling.is_kept]
        raise GateFailed(
            f"{settings.model.name} fails {len(broken)} of {len(evaluation.rulings)} gate rules: {', '.join(broken)}"
        )


def evaluate(settings: EvaluateSettings, load_scorer: LoadScorer, progress: ProgressSink) -> Evaluation:
    """One load of each model and judge. load_scorer: from a reward model's directory to the judge."""
    agenda = make_agenda(settings)
    findings = [examine(settings.model, settings, agenda, progress)]
    if settings.against is not None:
        kl_answers = findings[0].kl_answers
        findings.append(examine(settings.against, settings, agenda, progress, kl_answers=kl_answers))
    contenders = _judge_all(settings, _told_apart(findings), load_scorer, progress)
    evaluation = _sum_up(settings, agenda, contenders)
    _write(settings.out, evaluation, contenders, make_pages(contenders, agenda))
    return evaluation


def check_scorer(directory: Path) -> None:
    """Judges are loaded after hours of sampling; a directory that is none is found before. Raises CheckpointError."""
    from training.reward_model import load_reward_head

    load_reward_head(directory)


def load_scorer(directory: Path) -> Scorer:
    from training.reward_model import RewardModel

    return RewardModel.load(directory)


def _told_apart(findings: Sequence[Findings]) -> list[Findings]:
    """Two directories of one name get a word each."""
    names = [one.subject.name for one in findings]
    if len(set(names)) == len(names):
        return list(findings)
    return [
        replace(one, subject=replace(one.subject, name=f"{one.subject.name} ({word})"))
        for one, word in zip(findings, ("new", "old"), strict=True)
    ]


def _judge_all(
    settings: EvaluateSettings, findings: Sequence[Findings], load_scorer: LoadScorer, progress: ProgressSink
) -> list[Contender]:
    """Each judge is loaded once and reads every model's answers."""
    judged: list[list[Judged]] = [[] for _ in findings]
    paths = [path for path in (settings.reward_model, settings.second_reward_model) if path is not None]
    for done, path in enumerate(paths):
        scorer = load_scorer(path)
        for mine, one in zip(judged, findings, strict=True):
            mine.append(judge(path.absolute().name, scorer, one.answers))
        progress.update("judging", done + 1, len(paths))
    return [Contender(one, tuple(mine)) for one, mine in zip(findings, judged, strict=True)]


def _sum_up(settings: EvaluateSettings, agenda: Agenda, contenders: Sequence[Contender]) -> Evaluation:
    policy = load_policy() if "moderation" in agenda.groups else None
    measures = [measures_alone(one.findings, agenda, one.judged, policy, settings.seed) for one in contenders]
    new, old = measures[0], measures[1] if len(measures) > 1 else dict[str, Measure]()
    findings, judged = contenders[0].findings, contenders[0].judged
    if len(contenders) > 1:
        pairs = list(zip(judged, contenders[1].judged, strict=True))
        new |= measures_of_pair(findings, contenders[1].findings, pairs, agenda, settings.seed, settings.best_of)
    return Evaluation(
        model=findings.subject,
        against=contenders[1].findings.subject if len(contenders) > 1 else None,
        judges=tuple(one.judge for one in judged),
        new=new,
        old=old,
        perplexity_by_text=_by_text(findings, settings.seed),
        instructions=instruction_accuracy(checked_instructions(findings, agenda)) if "ifeval" in agenda.groups else {},
        best_of=best_of(findings, judged) if settings.best_of > 1 and "rewards" in agenda.groups else None,
        rulings=apply_rules(agenda.rules, new, old),
        skipped=agenda.skipped,
        left_out=_left_out(contenders),
        num_questions={name: len(one.questions) for name, one in agenda.questions.items()},
        data=agenda.files,
        settings=record_of(settings),
    )


def _by_text(findings: Findings, seed: int) -> dict[str, Measure]:
    fitting = {name: [loss for loss in losses if loss] for name, losses in findings.text_losses.items()}
    return {name: perplexity(losses, seed=seed) for name, losses in fitting.items() if losses}


def _left_out(contenders: Sequence[Contender]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in contenders:
        findings, name = one.findings, one.findings.subject.name
        counts |= {f"{name}: {key}": answers.num_left_out for key, answers in findings.answers.items()}
        counts |= {f"{name}: {key}": losses.count(None) for key, losses in findings.text_losses.items()}
        counts[f"{name}: conversations"] = findings.conversation_losses.count(None)
    return {where: count for where, count in counts.items() if count}


def _write(out: Path, evaluation: Evaluation, contenders: Sequence[Contender], pages: Sequence[Page]) -> None:
    """The whole directory or nothing."""
    with publish_directory(out) as folder:
        for name in ("answers", "plots", "pages"):
            (folder / name).mkdir()
        for role, one in zip(("new", "old"), contenders, strict=False):
            for name, answers in one.findings.answers.items():
                write_answers(folder / "answers" / f"{role}_{name}.jsonl", answers.answers)
        plots = write_plots(evaluation, _answer_tokens(contenders), folder / "plots")
        _write_pages(folder / "pages", evaluation, pages)
        record = json.dumps(as_json(evaluation), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / REPORT_NAME).write_text(record + "\n", encoding="utf-8")
        (folder / "report.md").write_text(as_markdown(evaluation, plots, bool(pages)), encoding="utf-8")


def _write_pages(folder: Path, evaluation: Evaluation, pages: Sequence[Page]) -> None:
    for page in pages:
        (folder / page.file_name).write_text(page_html(page), encoding="utf-8")
    index = index_html(f"Answers of {evaluation.model.name}", pages)
    (folder / "index.html").write_text(index, encoding="utf-8")


def _answer_tokens(contenders: Sequence[Contender]) -> Mapping[str, list[int]]:
    return {
        one.findings.subject.name: [len(a.answer_ids) for a in first_answers(one.findings.answers["prompts"]).values()]
        for one in contenders
        if "prompts" in one.findings.answers
    }


@contextlib.contextmanager
def _progress() -> Generator[ProgressSink]:
    if not sys.stderr.isatty():
        yield LineProgress()
        return
    with BarProgress() as bar:
        yield bar
