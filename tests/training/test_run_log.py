"""The log of a run: one row a step, the same after a resume, readable although a crash cut its last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.improvement import loss_improvement, sign_test
from training.run_log import RunLog, plot_run, read_log, smooth
from training.schedule import learning_rate_at

pytestmark = pytest.mark.unit


def write_log(run_dir: Path, steps: range, first_step: int = 0) -> None:
    with RunLog(run_dir, stage="test", num_steps=10, first_step=first_step) as log:
        for step in steps:
            log.record(step, {"loss": 1 / step})


def test_a_resumed_log_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write_log(tmp_path, range(1, 6))
    write_log(tmp_path, range(4, 7), first_step=3)
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [(n, 1 / n) for n in range(1, 7)]


def test_a_quantity_that_comes_later_gets_a_column(tmp_path: Path) -> None:
    with RunLog(tmp_path, stage="test", num_steps=2) as log:
        log.record(1, {"loss": 3.0})
        log.record(2, {"loss": 2.0, "held_out_loss": 4.0})
    assert read_log(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "held_out_loss": 4.0}]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    write_log(tmp_path, range(1, 4))
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4")
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    write_log(tmp_path, range(1, 9))
    assert plot_run(tmp_path, "test").read_bytes().startswith(b"\x89PNG")


def test_smoothing_starts_without_a_pull_to_zero() -> None:
    assert smooth([5.0] * 100) == pytest.approx([5.0] * 100)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_then_follows_its_schedule(schedule: str) -> None:
    rates = [
        learning_rate_at(step, 100, peak=1.0, schedule=schedule, warmup=0.1, final_share=0.2)  # pyright: ignore[reportArgumentType]
        for step in range(100)
    ]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.2)


def test_the_sign_test_is_the_exact_binomial() -> None:
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(4, 1) == pytest.approx(6 / 32)
    assert sign_test(0, 0) == 1.0
    assert sign_test(1500, 1500) == pytest.approx(0.507, abs=0.001)


def test_rows_that_did_not_change_count_for_neither_side() -> None:
    found = loss_improvement([3.0, 2.0, 1.0], [2.0, 2.0, 4.0])
    assert (found["held_out_rows_better"], found["held_out_rows_worse"]) == (1, 1)
