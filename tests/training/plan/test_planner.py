from __future__ import annotations

from dataclasses import replace

import pytest

from training.errors import TrainingError
from training.plan.devices import DEVICES, parse_fleet
from training.plan.planner import Layout, TrainWork, device_memory, plan_serve, plan_train
from training.sizes import SIZES, ModelSize, find_size

pytestmark = pytest.mark.unit


def work(name: str, micro_batch_size: int = 1) -> TrainWork:
    return TrainWork(find_size(name), tokens=1e9, micro_batch_size=micro_batch_size)


@pytest.mark.parametrize(
    ("name", "gpus", "rows", "layout"),
    [
        ("palm-150m", "1xh100", 1, "a copy on each device"),
        ("palm-1b", "1x4090", 4, "a copy on each device, gradient checkpointing"),
        ("palm-8b", "8xh100", 1, "FSDP over 8 devices"),
        ("palm-8b", "1x4090", 1, "main memory"),
        ("palm-62b", "64xh100", 1, "FSDP over 64 devices, gradient checkpointing"),
        ("palm-540b", "512xh100", 1, "gradient checkpointing, each layer on 2 devices together"),
    ],
)
def test_first_layout_that_fits_is_chosen(name: str, gpus: str, rows: int, layout: str) -> None:
    made = plan_train(work(name, rows), parse_fleet(gpus))
    assert made.fits
    assert str(made.layout).endswith(layout)


def test_what_fits_nowhere_says_so_and_from_how_many_devices_on_it_would() -> None:
    made = plan_train(work("palm-62b", micro_batch_size=64), parse_fleet("2xl4"))
    assert not made.fits
    assert made.smallest_fleet is None
    few = plan_train(work("palm-8b"), parse_fleet("2xa100-40"))
    assert few.smallest_fleet is not None
    enough = plan_train(work("palm-8b"), parse_fleet(f"{few.smallest_fleet}xa100-40"))
    assert enough.fits
    assert not enough.layout.offload


@pytest.mark.parametrize("device", DEVICES)
def test_more_devices_take_less_time_and_less_memory_of_each(device: str) -> None:
    layout = Layout(2, checkpointing=True)
    fleets = [parse_fleet(f"{count}x{device}") for count in (2, 4, 8)]
    times = [plan_train(work("llama-13b"), fleet).compute_seconds for fleet in fleets]
    needed = [device_memory(work("llama-13b"), fleet, replace(layout, shards=fleet.count)).total for fleet in fleets]
    assert times == sorted(times, reverse=True)
    assert needed == sorted(needed, reverse=True)


def test_slow_network_calls_for_sharing_layers_and_a_fast_link_does_not() -> None:
    assert plan_train(work("palm-62b"), parse_fleet("64xh100")).tensor_parallel == 8
    assert plan_train(work("palm-62b", micro_batch_size=16), parse_fleet("64xh100")).tensor_parallel < 8
    assert plan_train(work("palm-8b"), parse_fleet("8xh100")).tensor_parallel == 1


def test_price_and_utilisation_are_what_was_asked_for() -> None:
    fleet = parse_fleet("8xh100")
    usual = plan_train(work("palm-1b"), fleet)
    asked = plan_train(work("palm-1b"), fleet, mfu=usual.mfu / 2, price=2 * usual.dollars_per_hour)
    assert asked.compute_seconds == pytest.approx(2 * usual.compute_seconds)
    assert asked.dollars == pytest.approx(4 * usual.dollars)


@pytest.mark.parametrize("size", SIZES.values(), ids=lambda size: size.name)
def test_served_copy_fits_on_its_devices_and_not_on_half_of_them(size: ModelSize) -> None:
    made = plan_serve(size, parse_fleet("64xa100-80"), bits=16, length=2048, sequences=4)
    needed = made.weight_bytes + made.kv_bytes
    assert needed <= made.tensor_parallel * made.usable_bytes
    assert made.tensor_parallel == 1 or needed > made.tensor_parallel / 2 * made.usable_bytes
    assert made.copies == 64 // made.tensor_parallel


def test_more_conversations_at_a_time_are_cheaper_by_the_token() -> None:
    costs = [
        plan_serve(
            find_size("llama-7b"), parse_fleet("h100"), bits=4, length=2048, sequences=count
        ).dollars_per_million_tokens
        for count in (1, 4, 16)
    ]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("8xh10", "did you mean 'h100'"), ("0xh100", "known are"), ("eight h100", "as in 8xh100"), ("8x", "as in")],
)
def test_devices_that_do_not_exist_are_refused(text: str, reason: str) -> None:
    with pytest.raises(TrainingError, match=reason):
        parse_fleet(text)


def test_devices_are_read_in_the_usual_spellings() -> None:
    fleets = [parse_fleet(text) for text in ("8xH100", "8 x h100", "8*h100", "8×h100")]
    assert {(fleet.count, fleet.device.name) for fleet in fleets} == {(8, "h100")}
    assert parse_fleet("l4").count == 1
