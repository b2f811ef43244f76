"""What one evaluation will do, settled before any model is loaded: groups, questions, texts, gate rules.

Everything that can be wrong about the request is found here, not after hours of sampling.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from quant.model_directory import DataFile, hash_file
from serving.model.tokenizer import TOKENIZER_FILE
from serving.model.weights import load_spec
from training.data.files import open_lines, read_text
from training.data.records import Conversation, RowError, decode_conversation
from training.errors import DataError, TrainingError
from training.evaluate.catalogue import GROUP_NEEDS, GROUPS, Need, computed_measures
from training.evaluate.gate import Rule, check_rules, read_rules
from training.evaluate.perplexity import split_passages
from training.evaluate.questions import QuestionSet, find_data, read_labelled, read_questions, thin
from training.options import flag_of
from training.settings import EvaluateSettings

__all__ = ["REPORT_NAME", "Agenda", "make_agenda"]

REPORT_NAME = "report.json"
MAX_PASSAGE_BYTES = 2048
_HARMFUL = ("moderation/test_user_prompts_crossdomain", "moderation/test_xstest")
_HARMLESS = ("moderation/test_xstest",)
# Which groups a setting has an effect on.
_READERS = {
    "reward_model": frozenset({"rewards", "gsm8k", "mt_bench", "vicuna"}),
    "best_of": frozenset({"rewards"}),
    "texts": frozenset({"texts"}),
    "conversations": frozenset({"conversations"}),
    "prompts": frozenset({"kl", "rewards", "lengths", "moderation"}),
}
_EVAL_FILES = {
    "ifeval": "eval/ifeval",
    "gsm8k": "eval/gsm8k_test",
    "mt_bench": "eval/mt_bench",
    "vicuna": "eval/vicuna_bench",
}


@dataclass(frozen=True, slots=True)
class Agenda:
    """groups: in the catalogue's order. skipped: groups left out and why. passages: by the text's name."""

    groups: tuple[str, ...]
    skipped: Mapping[str, str]
    questions: Mapping[str, QuestionSet]
    passages: Mapping[str, tuple[str, ...]]
    conversations: tuple[Conversation, ...]
    rules: tuple[Rule, ...]
    files: tuple[DataFile, ...]


def make_agenda(settings: EvaluateSettings, environment: Mapping[str, str] | None = None) -> Agenda:
    """Raises TrainingError for settings that contradict each other, missing data, or a rule that cannot be decided."""
    _check_out(settings.out)
    environ = os.environ if environment is None else environment
    data = settings.data or (Path(environ["CAUSERIE_DATA"]) if environ.get("CAUSERIE_DATA") else None)
    given = _given(settings)
    groups, skipped = _choose_groups(settings, given)
    _refuse_without_effect(settings, groups)
    rules = () if settings.gate is None else read_rules(settings.gate)
    check_rules(rules, computed_measures(groups, given), settings.against is not None)
    questions = _questions(settings, data, groups)
    text_paths = _text_paths(settings, data) if "texts" in groups else ()
    conversations, conversation_files = _conversations(settings, data) if "conversations" in groups else ((), ())
    return Agenda(
        groups=groups,
        skipped=skipped,
        questions=questions,
        passages={path.name.partition(".")[0]: _passages(path, settings) for path in text_paths},
        conversations=conversations,
        rules=rules,
        files=(
            *(file for one in questions.values() for file in one.files),
            *(DataFile(path.name, hash_file(path), 1) for path in text_paths),
            *conversation_files,
        ),
    )


def _check_out(out: Path) -> None:
    """The report replaces what lies at OUT whole, so that may only be an older report or nothing."""
    if out.exists() and not (out / REPORT_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"--out {out} exists and is no evaluation report; it would be replaced: choose another")


def _given(settings: EvaluateSettings) -> set[Need]:
    if settings.second_reward_model is not None and settings.reward_model is None:
        raise TrainingError("--second-reward-model has no effect without --reward-model")
    if settings.best_of > 1 and settings.reward_model is None:
        raise TrainingError(f"--best-of {settings.best_of} needs a --reward-model to choose by")
    if settings.best_of > 1 and settings.temperature == 0:
        raise TrainingError(f"--best-of {settings.best_of} has no effect with --temperature 0: all answers are alike")
    given: set[Need] = {"best_of"} if settings.best_of > 1 else set()
    if settings.against is not None:
        given.add("against")
    if settings.reward_model is not None:
        given.add("reward_model")
    if settings.second_reward_model is not None:
        given.add("second_reward_model")
    return given


def _choose_groups(settings: EvaluateSettings, given: Collection[Need]) -> tuple[tuple[str, ...], dict[str, str]]:
    for name in settings.measures:
        if name not in GROUPS:
            near = difflib.get_close_matches(name, GROUPS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(GROUPS)}"
            raise TrainingError(f"--measures {name!r} is no group of measures; {hint}")
    skipped: dict[str, str] = {}
    for group in settings.measures or GROUPS:
        missing = [flag_of(need) for need in GROUP_NEEDS.get(group, ()) if need not in given]
        if missing:
            skipped[group] = f"needs {' and '.join(missing)}"
    if "kl" not in skipped and settings.against is not None and not _same_tokenizer(settings.model, settings.against):
        skipped["kl"] = f"{settings.model.name} and {settings.against.name} have different tokenizers"
    asked_in_vain = [f"{group} ({why})" for group, why in skipped.items() if group in settings.measures]
    if asked_in_vain:
        raise TrainingError(f"--measures cannot be computed: {', '.join(asked_in_vain)}")
    chosen = tuple(group for group in GROUPS if group in (settings.measures or GROUPS) and group not in skipped)
    return chosen, skipped


def _refuse_without_effect(settings: EvaluateSettings, groups: Collection[str]) -> None:
    given = {
        "reward_model": settings.reward_model is not None,
        "best_of": settings.best_of > 1,
        "texts": bool(settings.texts),
        "conversations": settings.conversations is not None,
        "prompts": settings.prompts is not None,
    }
    for name, readers in _READERS.items():
        if given[name] and readers.isdisjoint(groups):
            chosen, useful = " ".join(groups), ", ".join(sorted(readers))
            raise TrainingError(f"{flag_of(name)} has no effect with --measures {chosen}; it is for {useful}")


def _same_tokenizer(model: Path, against: Path) -> bool:
    """Also True where a directory has none, which loading the model will report better."""
    texts = [path / TOKENIZER_FILE for path in (model, against)]
    return not all(path.is_file() for path in texts) or texts[0].read_bytes() == texts[1].read_bytes()


def _questions(settings: EvaluateSettings, data: Path | None, groups: Collection[str]) -> dict[str, QuestionSet]:
    limit = settings.max_prompts
    sets: dict[str, QuestionSet] = {}
    if not _READERS["prompts"].isdisjoint(groups):
        path = settings.prompts or find_data(data, "prompts/val")
        sets["prompts"] = read_questions(path, "prompts", limit)
    if not {"refusals", "moderation"}.isdisjoint(groups):
        sets["harmful"] = read_labelled([find_data(data, name) for name in _HARMFUL], "harmful", 1, limit)
    if "refusals" in groups:
        sets["harmless"] = read_labelled([find_data(data, name) for name in _HARMLESS], "harmless", 0, limit)
    for group, name in _EVAL_FILES.items():
        if group in groups:
            sets[group] = read_questions(find_data(data, name), group, limit)
    return sets


def _text_paths(settings: EvaluateSettings, data: Path | None) -> tuple[Path, ...]:
    """Validation texts are for tuning and stay out."""
    if settings.texts:
        return settings.texts
    found = [] if data is None else sorted((data / "eval").glob("ppl_*.txt*"))
    paths = tuple(path for path in found if "valid" not in path.name)
    if not paths:
        where = "no evaluation data" if data is None else f"{data} has no eval/ppl_*.txt (or .gz)"
        raise TrainingError(f"{where}: name the directory with --data or CAUSERIE_DATA, or the files with --texts")
    return paths


def _passages(path: Path, settings: EvaluateSettings) -> tuple[str, ...]:
    size = _passage_bytes(settings)
    passages = split_passages(read_text(path), size)
    if not passages:
        raise DataError(f"{path} holds no text")
    return tuple(thin(passages, max(1, settings.max_text_bytes // size)))


def _passage_bytes(settings: EvaluateSettings) -> int:
    """At most one token a byte and two that frame the text: so a passage fits into each model's context."""
    directories = [settings.model] if settings.against is None else [settings.model, settings.against]
    return max(16, min(MAX_PASSAGE_BYTES, *(load_spec(directory).max_positions - 2 for directory in directories)))


def _conversations(
    settings: EvaluateSettings, data: Path | None
) -> tuple[tuple[Conversation, ...], tuple[DataFile, ...]]:
    path = settings.conversations or find_data(data, "sft/val")
    rows: list[Conversation] = []
    with open_lines(path) as lines:
        for number, line in lines:
            try:
                rows.append(decode_conversation(line))
            except (RowError, msgspec.MsgspecError) as error:
                raise DataError(f"{path} line {number}: {error}") from error
        sha256 = lines.sha256()
    if not rows:
        raise DataError(f"{path} holds no rows")
    return tuple(thin(rows, settings.max_prompts)), (DataFile(path.name, sha256, len(rows)),)
