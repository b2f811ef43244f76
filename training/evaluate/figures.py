"""From what the models said to the measures of the catalogue. Loads no model: judges come in as objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moderation.policy import Policy
from training.evaluate.agenda import Agenda
from training.evaluate.answers import Answer, AnswerSet, first_answers
from training.evaluate.divergence import measure_divergence
from training.evaluate.examine import Findings
from training.evaluate.gsm8k import is_correct
from training.evaluate.ifeval.accuracy import Checked, check_answer
from training.evaluate.intervals import Measure, mean_measure, share_measure
from training.evaluate.judging import Scorer, best_of_curve, best_of_index, disagreement, reward_gain, win_rate
from training.evaluate.lengths import length_measures
from training.evaluate.perplexity import Loss, bits_per_byte, increase_percent, perplexity
from training.evaluate.refusals import is_refusal

__all__ = [
    "BestOf",
    "Judged",
    "checked_instructions",
    "instruction_accuracy",
    "judge",
    "measures_alone",
    "measures_of_pair",
]

JUDGED_SETS = ("prompts", "gsm8k", "mt_bench", "vicuna")


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores of one reward model, by answer (set, question, turn, choice)."""

    judge: str
    scores: Mapping[tuple[str, str, int, int], float]

    def of(self, set_name: str, answer: Answer) -> float:
        return self.scores[set_name, answer.question_id, answer.turn, answer.choice]


@dataclass(frozen=True, slots=True)
class BestOf:
    """Mean score of best-of-k for k = 1..N, chosen by the first judge: by that judge, and by the second."""

    first: tuple[float, ...]
    second: tuple[float, ...] | None


def judge(name: str, scorer: Scorer, answers: Mapping[str, AnswerSet]) -> Judged:
    keyed = [
        (set_name, answer) for set_name in JUDGED_SETS if set_name in answers for answer in answers[set_name].answers
    ]
    scores = scorer.score([answer.conversation for _, answer in keyed])
    keys = [(set_name, answer.question_id, answer.turn, answer.choice) for set_name, answer in keyed]
    return Judged(name, dict(zip(keys, scores, strict=True)))


def measures_alone(
    findings: Findings, agenda: Agenda, judged: Sequence[Judged], policy: Policy | None, seed: int
) -> dict[str, Measure]:
    """What can be said of one model by itself. judged: by the first and the second judge, where there are."""
    measures: dict[str, Measure] = {}
    texts = [loss for losses in findings.text_losses.values() for loss in losses if loss is not None]
    if texts:
        measures |= {"perplexity": perplexity(texts, seed=seed), "bits_per_byte": bits_per_byte(texts, seed=seed)}
    answers = [loss for loss in findings.conversation_losses if loss is not None]
    if answers:
        measures["answer_perplexity"] = perplexity(answers, seed=seed)
        measures["answer_bits_per_byte"] = bits_per_byte(answers, seed=seed)
    if "rewards" in agenda.groups:
        for prefix, one in zip(("", "second_"), judged, strict=False):
            measures |= _rewards_alone(findings, one, judged[0], prefix, seed)
    if "lengths" in agenda.groups:
        measures |= length_measures(_first(findings, "prompts"), seed=seed)
    if "refusals" in agenda.groups:
        for name in ("harmful", "harmless"):
            refused = [float(is_refusal(answer.text)) for answer in _first(findings, name)]
            measures[f"refusal_{name}"] = share_measure(refused)
    if policy is not None and "moderation" in agenda.groups:
        for name, measure in (("prompts", "flagged_answers"), ("harmful", "flagged_harmful")):
            verdicts = policy.judge_texts([answer.text for answer in _first(findings, name)])
            measures[measure] = share_measure([float(verdict.flagged) for verdict in verdicts])
    if "ifeval" in agenda.groups:
        measures |= _ifeval_measures(checked_instructions(findings, agenda))
    if "gsm8k" in agenda.groups:
        references = {question.id: question.reference or "" for question in agenda.questions["gsm8k"].questions}
        right = [is_correct(answer.text, references[answer.question_id]) for answer in _first(findings, "gsm8k")]
        measures["gsm8k_correct"] = share_measure([float(one) for one in right])
    return measures


def measures_of_pair(
    new: Findings, old: Findings, judged: Sequence[tuple[Judged, Judged]], agenda: Agenda, seed: int, best_of: int
) -> dict[str, Measure]:
    """What compares the two. judged: per judge, its scores of the new and of the old model's answers."""
    measures: dict[str, Measure] = {}
    texts = _both(
        [loss for losses in new.text_losses.values() for loss in losses],
        [loss for losses in old.text_losses.values() for loss in losses],
    )
    if texts:
        measures["perplexity_increase_percent"] = increase_percent(*zip(*texts, strict=True), seed=seed)
    answers = _both(new.conversation_losses, old.conversation_losses)
    if answers:
        measures["answer_perplexity_increase_percent"] = increase_percent(*zip(*answers, strict=True), seed=seed)
    scored = [(a, b) for a, b in zip(new.kl_logprobs, old.kl_logprobs, strict=True) if a is not None and b is not None]
    if scored:
        divergence = measure_divergence([a for a, _ in scored], [b for _, b in scored], seed=seed)
        measures["kl_per_token"] = divergence.per_token
        measures["kl_per_token_k3"] = divergence.per_token_k3
        measures["kl_per_answer"] = divergence.per_answer
    if "rewards" in agenda.groups:
        measures |= _rewards_of_pair(new, old, judged, seed, best_of)
    return measures


def best_of(findings: Findings, judged: Sequence[Judged]) -> BestOf:
    groups = list(_choices(findings).values())
    scores = [[[one.of("prompts", answer) for answer in group] for group in groups] for one in judged]
    curves = [tuple(best_of_curve(values, scores[0])) for values in scores]
    return BestOf(curves[0], curves[1] if len(curves) > 1 else None)


def checked_instructions(findings: Findings, agenda: Agenda) -> list[Checked]:
    instructions = {question.id: question.instructions for question in agenda.questions["ifeval"].questions}
    return [check_answer(answer.text, instructions[answer.question_id]) for answer in _first(findings, "ifeval")]


def instruction_accuracy(checked: Sequence[Checked]) -> dict[str, Measure]:
    """Strict, by instruction."""
    outcomes: dict[str, list[float]] = defaultdict(list)
    for one in checked:
        for instruction, followed in zip(one.instructions, one.strict, strict=True):
            outcomes[instruction.name].append(float(followed))
    return {name: share_measure(values) for name, values in sorted(outcomes.items())}


def _rewards_alone(findings: Findings, judged: Judged, chooser: Judged, prefix: str, seed: int) -> dict[str, Measure]:
    firsts = [judged.of("prompts", answer) for answer in _first(findings, "prompts")]
    measures = {f"{prefix}reward": mean_measure(firsts, seed=seed)}
    chosen = _chosen(findings, chooser)
    if max(answer.choice for answer in findings.answers["prompts"].answers) > 0:
        best = [judged.of("prompts", answer) for answer in chosen.values()]
        measures[f"{prefix}best_of_reward_gain"] = reward_gain(best, firsts, seed=seed)
    return measures


def _rewards_of_pair(
    new: Findings, old: Findings, judged: Sequence[tuple[Judged, Judged]], seed: int, best_of: int
) -> dict[str, Measure]:
    measures: dict[str, Measure] = {}
    ours, theirs = (first_answers(findings.answers["prompts"]) for findings in (new, old))
    keys = [key for key in ours if key in theirs]
    paired: list[tuple[list[float], list[float]]] = []
    for prefix, (judged_new, judged_old) in zip(("", "second_"), judged, strict=False):
        scores_new = [judged_new.of("prompts", ours[key]) for key in keys]
        scores_old = [judged_old.of("prompts", theirs[key]) for key in keys]
        paired.append((scores_new, scores_old))
        measures[f"{prefix}win_rate"] = win_rate(scores_new, scores_old)
        measures[f"{prefix}reward_gain"] = reward_gain(scores_new, scores_old, seed=seed)
        if best_of > 1:
            chosen = _chosen(new, judged[0][0])
            best = [judged_new.of("prompts", chosen[key]) for key in keys]
            measures[f"{prefix}best_of_win_rate"] = win_rate(best, scores_old)
    if len(paired) > 1:
        measures["judges_disagree"] = disagreement(paired[0], paired[1])
    return measures


def _choices(findings: Findings) -> dict[tuple[str, int], list[Answer]]:
    groups: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for answer in findings.answers["prompts"].answers:
        groups[answer.question_id, answer.turn].append(answer)
    return dict(groups)


def _chosen(findings: Findings, chooser: Judged) -> dict[tuple[str, int], Answer]:
    """Best-of-N by the first judge, whichever judge looks at the result."""
    return {
        key: group[best_of_index([chooser.of("prompts", answer) for answer in group])]
        for key, group in _choices(findings).items()
    }


def _first(findings: Findings, name: str) -> list[Answer]:
    return list(first_answers(findings.answers[name]).values())


def _both(new: Sequence[Loss | None], old: Sequence[Loss | None]) -> list[tuple[Loss, Loss]]:
    return [(a, b) for a, b in zip(new, old, strict=True) if a is not None and b is not None]


def _ifeval_measures(checked: Sequence[Checked]) -> dict[str, Measure]:
    measures: dict[str, Measure] = {}
    for kind, outcomes in (("strict", [one.strict for one in checked]), ("loose", [one.loose for one in checked])):
        measures[f"ifeval_prompt_{kind}"] = share_measure([float(all(one)) for one in outcomes])
        measures[f"ifeval_instruction_{kind}"] = share_measure([float(item) for one in outcomes for item in one])
    return measures
