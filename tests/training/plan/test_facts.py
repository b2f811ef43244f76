"""The plans against published facts, within a factor of two. What a fact leaves open is assumed here, in words."""

from __future__ import annotations

import pytest

from training.plan.devices import GIB, parse_fleet
from training.plan.planner import TrainWork, plan_serve, plan_train
from training.sizes import find_size

pytestmark = pytest.mark.unit

DAY_S = 86_400


def is_within_factor_two(planned: float, published: float) -> bool:
    return published / 2 <= planned <= published * 2


def test_bloom_176b_takes_384_a100_about_three_months() -> None:
    """arXiv:2211.05100, section 3.4: 366 billion tokens, 384 A100 of 80 GB. We assume 40 % of their peak."""
    work = TrainWork(find_size("bloom-176b"), tokens=366e9, length=2048)
    made = plan_train(work, parse_fleet("384xa100-80"))
    assert made.mfu == 0.40
    assert made.fits
    assert is_within_factor_two(made.seconds / DAY_S, 3 * 30.4)


def test_bloom_176b_is_served_by_about_eight_a100() -> None:
    """In 16 bits. We assume devices of 80 GB and one conversation of 2048 tokens for each of 8 users."""
    made = plan_serve(find_size("bloom-176b"), parse_fleet("8xa100-80"), bits=16, length=2048, sequences=8)
    assert made.fits
    assert is_within_factor_two(made.tensor_parallel, 8)


def test_training_1_5_billion_parameters_cost_up_to_1_6_million_dollars_in_2020() -> None:
    """arXiv:2004.08900, section 2: $80k to $1.6M, the upper end with tuning and several runs of each setting.

    We assume 20 runs, the ratio of the two ends; 300 billion tokens each, as in arXiv:2005.14165; V100 in the cloud
    at $3.06 an hour, 30 % of their peak.
    """
    work = TrainWork(find_size("gpt2-1b5"), tokens=300e9, length=1024)
    made = plan_train(work, parse_fleet("256xv100-32"), price=3.06)
    assert made.mfu == 0.30
    assert is_within_factor_two(made.dollars, 80_000)
    assert is_within_factor_two(20 * made.dollars, 1_600_000)


def test_175_billion_parameters_on_one_cloud_machine_cost_about_87000_dollars_a_year() -> None:
    """The estimate of 2020 for GPT-3 on one machine with 8 V100 of 32 GB.

    16 bits do not fit on such a machine, so we assume 8. It was reserved for three years, at about $9.7 an hour.
    """
    made = plan_serve(find_size("gpt3-175b"), parse_fleet("8xv100-32"), bits=8, length=2048, sequences=1, price=9.7 / 8)
    assert made.fits
    assert made.tensor_parallel == 8
    assert is_within_factor_two(made.dollars_per_year, 87_000)
    sixteen = plan_serve(find_size("gpt3-175b"), parse_fleet("8xv100-32"), bits=16, length=2048, sequences=1)
    assert not sixteen.fits


def test_7_billion_parameters_in_4_bits_take_4_gigabytes() -> None:
    """Groups of 128, embedding and head in 16 bits. We assume one conversation of 512 tokens."""
    made = plan_serve(find_size("llama-7b"), parse_fleet("4090"), bits=4, length=512, sequences=1)
    assert made.weight_bytes + made.kv_bytes < 4 * GIB
    assert is_within_factor_two(made.weight_bytes + made.kv_bytes, 4 * GIB)


def test_palm_540b_took_6144_chips_about_two_months() -> None:
    """arXiv:2204.02311, sections 4 and 5: 780 billion tokens; TPU v4 at 275e12 operations a second and 46.2 % MFU."""
    work = TrainWork(find_size("palm-540b"), tokens=780e9, length=2048)
    made = plan_train(work, parse_fleet("6144xa100-80"), mfu=0.462 * 275 / 312)
    assert is_within_factor_two(made.compute_seconds / DAY_S, 60)
