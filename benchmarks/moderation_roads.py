"""What different readers of text are worth for moderation, before anything is fine-tuned: the decision note's table.

    python -m benchmarks.moderation_roads --data ../shared/data --trunk e5-small-q4.bin --minilm DIR --chat-model DIR

Each reader turns a text into one vector, a logistic regression is fitted on the same rows of the corpus, and every test
file is judged on the same sample of its rows. Readers that are not named are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moderation.corpus import collect_corpus, list_test_files
from moderation.encoder import FIRST_TOKEN, LAST_TOKEN
from moderation.goals import TEST_GOALS
from moderation.metrics import area_under_precision_recall, area_under_roc
from moderation.network import Network
from moderation.pretrained import build_tokenizer, read_trunk
from moderation.rows import Row, labelled_rows
from moderation.targets import OUTPUTS

Reader = Callable[[str], npt.NDArray[np.float32]]
MAX_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Road:
    """areas: by test file, the measure that its goal is in. ms: one text in the mean, one thread."""

    name: str
    areas: dict[str, float]
    ms: float


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    torch.set_num_threads(1)
    corpus = collect_corpus(options.data, "yes", rows_per_line=12, passages=1000, seed=0)
    rows = random.Random(0).sample(corpus.rows, options.rows)  # noqa: S311
    tests = {name: _sample(options.data, name, options.test_rows) for name in list_test_files(options.data)}
    roads: list[Road] = []
    for name, make in _readers(options).items():
        roads.append(_probe(name, make(), rows, tests))
        print(_line(roads[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([{"name": r.name, "areas": r.areas, "ms": r.ms} for r in roads], indent=1))


def _readers(options: argparse.Namespace) -> dict[str, Callable[[], Reader]]:
    readers: dict[str, Callable[[], Reader]] = {}
    if options.minilm:
        readers["MiniLM, 6 layers, frozen"] = lambda: _transformers_reader(options.minilm)
    if options.trunk:
        readers["multilingual-e5-small, 9 layers, frozen"] = lambda: _trunk_reader(options.trunk, 9)
        readers["multilingual-e5-small, 12 layers, frozen"] = lambda: _trunk_reader(options.trunk, 12)
    if options.chat_model:
        readers["chat model's trunk, frozen"] = lambda: _transformers_reader(options.chat_model)
    return readers


def _probe(name: str, read: Reader, rows: Sequence[Row], tests: dict[str, list[Row]]) -> Road:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    began_s = time.process_time()
    vectors = np.stack([read(row.text) for row in rows])
    ms = 1000.0 * (time.process_time() - began_s) / len(rows)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=500))
    probe.fit(vectors, [row.label for row in rows])
    areas: dict[str, float] = {}
    for file, held_out in tests.items():
        scores = probe.decision_function(np.stack([read(row.text) for row in held_out]))
        areas[_short(file)] = _area(file, held_out, np.asarray(scores, np.float64))
    return Road(name, areas, round(ms, 1))


def _area(file: str, rows: Sequence[Row], scores: npt.NDArray[np.float64]) -> float:
    labels = np.array([row.label for row in rows], np.int64)
    goal = TEST_GOALS.get(_short(file))
    area = area_under_roc if goal is not None and goal.area == "AUROC" else area_under_precision_recall
    return round(area(labels, scores), 3)


def _trunk_reader(path: Path, layers: int) -> Reader:
    trunk = read_trunk(path, layers, positions=128)
    tokenizer = build_tokenizer(trunk.pieces)
    network = Network(trunk.shape, len(OUTPUTS)).eval()
    network.load_state_dict({name: torch.tensor(values) for name, values in trunk.tensors.items()}, strict=False)

    @torch.no_grad()
    def read(text: str) -> npt.NDArray[np.float32]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[: MAX_TOKENS - 2]
        row = torch.tensor([[FIRST_TOKEN, *ids, LAST_TOKEN]])
        return network.states(row, torch.ones_like(row, dtype=torch.bool))[0].mean(0).numpy()

    return read


def _transformers_reader(directory: Path) -> Reader:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.no_grad()
    def read(text: str) -> npt.NDArray[np.float32]:
        tokens = tokenizer(text or " ", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return model(**tokens).last_hidden_state[0].float().mean(0).numpy()

    return read


def _sample(data: Path, name: str, count: int) -> list[Row]:
    rows, _ = labelled_rows(data, name)
    return random.Random(0).sample(rows, min(count, len(rows)))  # noqa: S311


def _short(file: str) -> str:
    return file.removeprefix("moderation/").removesuffix(".jsonl.gz")


def _line(road: Road) -> str:
    return f"| {road.name} | {' | '.join(f'{value:.3f}' for value in road.areas.values())} | {road.ms} |"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--trunk", type=Path, metavar="FILE", help="packed multilingual-e5-small")
    parser.add_argument("--minilm", type=Path, metavar="DIR", help="all-MiniLM-L6-v2")
    parser.add_argument("--chat-model", type=Path, metavar="DIR", help="source directory of the default chat model")
    parser.add_argument("--rows", type=int, default=6000, metavar="N", help="training rows (6000)")
    parser.add_argument("--test-rows", type=int, default=400, metavar="N", help="rows of each test file (400)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
