from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moderation.encoder import Encoder
from moderation.errors import ModerationError
from moderation.rows import Row
from moderation.targets import OUTPUTS
from moderation.train_encoder import (
    MOST_ROWS,
    REPEATED,
    EncoderOptions,
    TrainedEncoder,
    draw_epoch,
    masked_loss,
    train_encoder,
)
from quant.progress import SilentProgress
from tests.moderation.fake_trunk import write_trunk

pytestmark = pytest.mark.unit

OPTIONS = EncoderOptions(
    layers=2, positions=140, least_uses=1, max_tokens=40, steps=6, batch=4, checkpoint_every=2, learning_rate=1e-3
)
GOOD = [Row(f"please water the plant {word}", 0, "en", "s") for word in ("now", "soon", "later", "today")]
BAD = [Row(f"murder the {word}", 1, "en", "s", "violence") for word in ("king", "queen", "jack", "ace")]


def train(folder: Path, options: EncoderOptions = OPTIONS, rows: list[Row] | None = None) -> TrainedEncoder:
    folder.mkdir(exist_ok=True)
    trunk = write_trunk(folder / "trunk.bin")
    used = GOOD + BAD if rows is None else rows
    texts = [row.text for row in used]
    return train_encoder(used, texts, trunk, options, folder / "checkpoint", "1", SilentProgress())


def test_training_tells_the_labels_apart(tmp_path: Path) -> None:
    train(tmp_path, replace(OPTIONS, steps=60, dropout=0.0)).write(tmp_path / "encoder")
    encoder = Encoder.load(tmp_path / "encoder")

    harmful = encoder.logits([row.text for row in BAD])[:, 0]
    harmless = encoder.logits([row.text for row in GOOD])[:, 0]

    assert harmful.min() > harmless.max() + 1.0


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    first = train(tmp_path / "a")

    assert train(tmp_path / "b") == first
    assert train(tmp_path / "c", replace(OPTIONS, seed=1)).weights != first.weights


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole")

    class Stop(SilentProgress):
        def update(self, stage: str, done: float, total: float) -> None:
            if done == 5:
                raise KeyboardInterrupt

    trunk = write_trunk(tmp_path / "trunk.bin")
    rows = GOOD + BAD
    texts = [row.text for row in rows]
    with pytest.raises(KeyboardInterrupt):
        train_encoder(rows, texts, trunk, OPTIONS, tmp_path / "checkpoint", "1", Stop())
    resumed = train_encoder(rows, texts, trunk, OPTIONS, tmp_path / "checkpoint", "1", SilentProgress())

    assert resumed == whole


def test_the_checkpoint_of_other_rows_is_refused(tmp_path: Path) -> None:
    train(tmp_path)

    with pytest.raises(ModerationError, match="of another run"):
        train(tmp_path, rows=GOOD + BAD[:3])


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"nothing")

    with pytest.raises(ModerationError, match="cannot be read"):
        train(tmp_path)


def test_word_embeddings_stay_as_they_came(tmp_path: Path) -> None:
    short, long = train(tmp_path / "a"), train(tmp_path / "b", replace(OPTIONS, steps=20))
    short.write(tmp_path / "short")
    long.write(tmp_path / "long")

    few, many = (Encoder.load(tmp_path / name)._word_codes for name in ("short", "long"))

    np.testing.assert_array_equal(few, many)


def test_unknown_targets_cost_nothing() -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0], [-0.5, 1.0, 3.0]])
    targets = torch.tensor([[1.0, math.nan, 0.0], [0.0, math.nan, math.nan]])

    loss = masked_loss(logits, targets, category_weight=0.5)

    # Both decisions cost log(1 + e^-0.5); of the two categories only one value is known: log(1 + e^-1).
    expected = math.log1p(math.exp(-0.5)) + 0.5 * (0.0 + math.log1p(math.exp(-1.0))) / 2
    assert loss.item() == pytest.approx(expected)


def test_large_sources_are_drawn_from_and_small_ones_repeated() -> None:
    rows = [Row(str(i), 0, "en", "gsm8k_train") for i in range(2000)] + [Row("x", 1, "en", "harmbench")]

    drawn = draw_epoch(rows, random.Random(0))

    assert sum(row.source == "gsm8k_train" for row in drawn) == MOST_ROWS["gsm8k_train"]
    assert sum(row.source == "harmbench" for row in drawn) == REPEATED["harmbench"]
    assert len({row.text for row in drawn if row.source == "gsm8k_train"}) == MOST_ROWS["gsm8k_train"]


def test_there_is_a_logit_for_every_output(tmp_path: Path) -> None:
    assert train(tmp_path).config.outputs == OUTPUTS
