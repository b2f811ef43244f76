"""One side of benchmarks/moderation.py: one classifier in one process on one core, one JSON line at the end.

Imports each classifier only where it is used: the peers run in their own environment, where ours does not exist.

    python -m benchmarks.moderation_sides causerie TASK.json
    ENV/bin/python -P benchmarks/moderation_sides.py alt-profanity-check TASK.json
"""
# The peers are not installed where types are checked.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH_ROWS = 64
WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Side:
    """one: what a server would call for a message; batch: (score, is flagged) of many, at the side's own default."""

    name: str
    one: Callable[[str], object]
    batch: Callable[[Sequence[str]], list[tuple[float, bool]]]


def main(argv: list[str]) -> None:
    kind, path = argv
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {task["core"]})
    began_s = time.perf_counter()
    side = SIDES[kind](task)
    side.one("a first message")
    found: dict[str, Any] = {"side": side.name, "load_s": time.perf_counter() - began_s}
    found["latency_ms"] = {tokens: latencies(side, messages) for tokens, messages in task["messages"].items()}
    found |= judge_rows(side, task["rows"])
    found["peak_resident_mb"] = peak_resident_mb()
    print(json.dumps(found))


def latencies(side: Side, messages: Sequence[str]) -> list[float]:
    for message in messages[:WARM_UP]:
        side.one(message)
    return [milliseconds(side, message) for message in messages]


def milliseconds(side: Side, message: str) -> float:
    began_s = time.perf_counter()
    side.one(message)
    return 1000.0 * (time.perf_counter() - began_s)


def judge_rows(side: Side, rows: Sequence[str]) -> dict[str, Any]:
    """Scores and flags of all rows, and rows a second. Empty if there are none: a round for latency alone."""
    if not rows:
        return {}
    began_s = time.perf_counter()
    judged: list[tuple[float, bool]] = []
    for start in range(0, len(rows), BATCH_ROWS):
        judged += side.batch(rows[start : start + BATCH_ROWS])
    spent_s = time.perf_counter() - began_s
    return {
        "scores": [score for score, _ in judged],
        "flagged": [is_flagged for _, is_flagged in judged],
        "messages_per_s": len(rows) / spent_s,
    }


def peak_resident_mb() -> float:
    # Not getrusage: a child starts with the peak of the process that started it.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def causerie(task: dict[str, Any]) -> Side:
    """The whole policy, as the server asks it: windows, disguises and all."""
    from moderation.policy import load_policy

    policy = load_policy(Path(task["weights"]) if task["weights"] else None)
    return Side(
        policy.model_id,
        lambda text: policy.judge_texts([text]),
        lambda texts: [(verdict.probability, verdict.flagged) for verdict in policy.judge_texts(texts)],
    )


def alt_profanity_check(_: dict[str, Any]) -> Side:
    from importlib.metadata import version

    from profanity_check import predict_prob

    def batch(texts: Sequence[str]) -> list[tuple[float, bool]]:
        # Its `predict` is this probability from 0.5 on.
        return [(float(probability), bool(probability >= 0.5)) for probability in predict_prob(list(texts))]

    return Side(f"alt-profanity-check {version('alt-profanity-check')}", lambda text: predict_prob([text]), batch)


def toxic_comment_classifier(_: dict[str, Any]) -> Side:
    """A BiLSTM trained on the Jigsaw comments. Its `predict_batch` calls the network text by text; here it is batched.

    The score is that of its class `toxic`: its own mean over six classes hardly rises where one of them is sure.
    """
    from importlib.metadata import version

    from tensorflow.keras.preprocessing.sequence import pad_sequences
    from toxic_classifier import ToxicCommentClassifier
    from toxic_classifier.model import MAXLEN

    classifier = ToxicCommentClassifier()

    def batch(texts: Sequence[str]) -> list[tuple[float, bool]]:
        ids = pad_sequences(classifier.tokenizer.texts_to_sequences(list(texts)), maxlen=MAXLEN)
        found = classifier.model.predict(ids, batch_size=BATCH_ROWS, verbose=0)[:, 0]
        return [(float(probability), bool(probability >= 0.5)) for probability in found]

    return Side(f"toxic-comment-classifier {version('toxic-comment-classifier')}", classifier.classify, batch)


SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {
    "causerie": causerie,
    "alt-profanity-check": alt_profanity_check,
    "toxic-comment-classifier": toxic_comment_classifier,
}


if __name__ == "__main__":
    main(sys.argv[1:])
