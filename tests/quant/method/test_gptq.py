from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.errors import QuantizationError
from quant.method.gptq import (
    ActOrder,
    GptqOptions,
    HessianSum,
    choose_group_size,
    inverse_cholesky,
    output_error,
    quantize_matrix,
    round_to_nearest,
)
from quant.method.grids import Grid, find_grid, nearest_codes
from quant.method.scales import storable_scale

pytestmark = pytest.mark.unit


def correlated_inputs(num_rows: int, num_inputs: int, seed: int = 0) -> Tensor:
    """Inputs that share a few directions, of very different sizes: where error feedback has something to work with."""
    generator = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn((num_inputs, num_inputs), generator=generator) * torch.rand(num_inputs, generator=generator) ** 3
    )
    return torch.randn((num_rows, num_inputs), generator=generator) @ mixing


def case(out_features: int = 24, in_features: int = 128) -> tuple[Tensor, Tensor]:
    """(weight, Hessian)."""
    weight = torch.randn((out_features, in_features), generator=torch.Generator().manual_seed(7)) * 0.05
    return weight, hessian_of(correlated_inputs(1024, in_features))


def hessian_of(inputs: Tensor) -> Tensor:
    total = HessianSum(inputs.shape[-1])
    total.add(inputs)
    return total.mean()


OPTIONS = [
    GptqOptions(group_size=32),
    GptqOptions(group_size=32, symmetric=False),
    GptqOptions(group_size=64, act_order=ActOrder.STATIC),
    GptqOptions(group_size=32, act_order=ActOrder.SHUFFLED),
    GptqOptions(group_size=-1),
    GptqOptions(group_size=32, range_search=False),
    GptqOptions(group_size=32, bits=8),
    GptqOptions(group_size=128),
]


def test_hessian_is_the_mean_outer_product_however_it_is_streamed() -> None:
    inputs = correlated_inputs(96, 400)
    total = HessianSum(400)
    for part in inputs.view(4, 24, 400).split(1):
        total.add(part)
    expected = inputs.t().double() @ inputs.double() / 96
    assert torch.allclose(total.mean().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_outputs_change_less_than_by_rounding_to_nearest(options: GptqOptions) -> None:
    weight, hessian = case()
    nearest = output_error(weight, round_to_nearest(weight, options, hessian.diagonal()), hessian)
    assert quantize_matrix(weight, hessian, options).error < 0.8 * nearest


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_reported_error_is_that_of_real_outputs(options: GptqOptions) -> None:
    weight = case()[0]
    inputs = correlated_inputs(512, 128)
    result = quantize_matrix(weight, hessian_of(inputs), options)
    exact, found = inputs @ weight.t(), inputs @ result.matrix.dequantize().t()
    assert result.error == pytest.approx(float((found - exact).square().sum() / exact.square().sum()), rel=1e-2)


@pytest.mark.parametrize("act_order", ActOrder)
def test_the_hessian_is_as_it_was_afterwards(act_order: ActOrder) -> None:
    weight, hessian = case()
    before = hessian.clone()
    quantize_matrix(weight, hessian, GptqOptions(group_size=32, act_order=act_order))
    assert torch.equal(hessian, before)
    hopeless = torch.eye(128) + 100.0 * torch.eye(128).flip(0)
    hopeless[5, 5] = 3.0  # first in any order but the natural
    before = hopeless.clone()
    with pytest.raises(QuantizationError, match="calibration text"):
        quantize_matrix(weight, hopeless, GptqOptions(group_size=32, act_order=act_order))
    assert torch.equal(hopeless, before)


def plain_gptq(weight: Tensor, hessian: Tensor, options: GptqOptions, damp: float) -> Tensor:
    """One column at a time over the whole matrix, as the paper states it: the twin of the blocked version."""
    assert options.group_size is not None
    columns = weight.t().clone()
    root = inverse_cholesky(hessian, damp)[0]
    reached = torch.empty_like(columns)
    grids: list[Grid] = []
    for column in range(columns.shape[0]):
        first = column // options.group_size * options.group_size
        group = slice(first, first + options.group_size)
        if column == first:
            grids.append(find_grid(columns[group], root.diagonal()[group].pow(-2), options.grid))
        grid = grids[-1]
        reached[column] = (nearest_codes(columns[column], grid, options.bits) - grid.zero) * grid.scale
        error = (columns[column] - reached[column]) / root[column, column]
        columns[column:] -= torch.outer(root[column, column:], error)
    return reached.t()


@pytest.mark.parametrize(("in_features", "group_size"), [(256, 32), (192, 192), (160, 20), (96, 48)])
def test_blocks_change_nothing_but_speed(in_features: int, group_size: int) -> None:
    weight, hessian = case(8, in_features)
    options = GptqOptions(group_size=group_size, refine_sweeps=0)
    expected = plain_gptq(weight, hessian, options, options.damp)
    found = quantize_matrix(weight, hessian, options).matrix.dequantize()
    # Sums in another order can tip a weight that lies between two codes; what follows then differs too.
    assert float((found != expected).float().mean()) < 0.02


def test_act_order_helps_where_a_few_late_inputs_matter_most() -> None:
    weight, _ = case()
    inputs = correlated_inputs(1024, 128) * torch.logspace(-1, 1, 128)
    hessian = hessian_of(inputs)
    natural = quantize_matrix(weight, hessian, GptqOptions(group_size=32))
    ordered = quantize_matrix(weight, hessian, GptqOptions(group_size=32, act_order=ActOrder.STATIC))
    assert ordered.error < natural.error


def test_static_act_order_is_plain_gptq_on_groups_sorted_by_importance() -> None:
    weight, hessian = case()
    options = GptqOptions(group_size=32, act_order=ActOrder.STATIC, refine_sweeps=0)
    importance: list[float] = hessian.diagonal().tolist()
    groups = [sorted(range(first, first + 32), key=lambda i: -importance[i]) for first in range(0, 128, 32)]
    groups.sort(key=lambda group: -sum(importance[i] for i in group))
    order = [column for group in groups for column in group]
    assert order != list(range(128))
    expected = torch.empty_like(weight)
    expected[:, order] = plain_gptq(weight[:, order], hessian[order][:, order], options, options.damp)
    matrix = quantize_matrix(weight, hessian, options).matrix
    assert matrix.group_of_input is None
    assert float((matrix.dequantize() != expected).float().mean()) < 0.02


def test_shuffled_act_order_is_plain_gptq_on_inputs_sorted_by_importance() -> None:
    weight, hessian = case()
    options = GptqOptions(group_size=32, act_order=ActOrder.SHUFFLED, refine_sweeps=0)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    expected = torch.empty_like(weight)
    expected[:, order] = plain_gptq(weight[:, order], hessian[order][:, order], options, options.damp)
    matrix = quantize_matrix(weight, hessian, options).matrix
    assert float((matrix.dequantize() != expected).float().mean()) < 0.02
    assert matrix.group_of_input is not None
    assert matrix.group_of_input[order].tolist() == [position // 32 for position in range(128)]


def test_one_group_over_all_inputs_is_named_by_minus_one() -> None:
    weight, hessian = case()
    for act_order in ActOrder:
        matrix = quantize_matrix(weight, hessian, GptqOptions(group_size=-1, act_order=act_order)).matrix
        assert matrix.group_size == 128
        assert tuple(matrix.scales.shape) == (24, 1)
        assert matrix.group_of_input is None  # a single group has no order
    assert choose_group_size([576, 40], -1) == -1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", ActOrder)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_group_of_one_sign_keeps_its_zero_point_storable(bits: int, act_order: ActOrder, sign: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = sign * (torch.rand((16, 64), generator=generator) + 0.1)
    options = GptqOptions(bits=bits, group_size=32, symmetric=False, act_order=act_order)
    matrix = quantize_matrix(weight, hessian_of(correlated_inputs(256, 64)), options).matrix
    assert int(matrix.zeros.min()) >= 1
    assert int(matrix.zeros.max()) <= (1 << bits) - 1
    # Unshifted, the zero point would be 0 (or the largest code): the grid still reaches every weight
    # to half a step, but for the rounding of its scale.
    unsearched = replace(options, range_search=False)
    step = 1.1 / ((1 << bits) - 2)
    assert float((round_to_nearest(weight, unsearched).dequantize() - weight).abs().max()) < 0.65 * step


def test_symmetric_grids_have_their_zero_in_the_middle() -> None:
    weight, hessian = case()
    assert quantize_matrix(weight, hessian, GptqOptions(group_size=32)).matrix.zeros.unique().tolist() == [8]
    assert quantize_matrix(weight, hessian, GptqOptions(group_size=32, bits=8)).matrix.zeros.unique().tolist() == [128]


def test_scales_are_held_exactly_by_the_file_and_by_the_fast_product() -> None:
    weight, hessian = case()
    scales = quantize_matrix(weight, hessian, GptqOptions(group_size=32, symmetric=False)).matrix.scales
    assert torch.equal(scales.to(torch.float16).to(torch.float32), scales)
    assert torch.equal(scales.to(torch.bfloat16).to(torch.float32), scales)


def test_a_group_of_zeros_stays_zero() -> None:
    weight, hessian = case()
    weight[:, :32] = 0.0
    for symmetric in (True, False):
        options = GptqOptions(group_size=32, symmetric=symmetric)
        assert not bool(round_to_nearest(weight, options).dequantize()[:, :32].any())
        assert bool(torch.isfinite(quantize_matrix(weight, hessian, options).matrix.dequantize()).all())


def test_inputs_that_never_occur_are_set_to_zero() -> None:
    weight = case()[0]
    inputs = correlated_inputs(256, 128)
    inputs[:, 5] = 0.0
    matrix = quantize_matrix(weight, hessian_of(inputs), GptqOptions(group_size=32)).matrix
    assert not bool(matrix.dequantize()[:, 5].any())


def test_damping_grows_until_a_singular_hessian_can_be_inverted() -> None:
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]])  # eigenvalues 4 and -2; mean diagonal 1
    root, damp = inverse_cholesky(indefinite, 0.01)
    assert damp == pytest.approx(10.0)
    damped = indefinite + damp * torch.eye(2)
    assert torch.allclose(root.t() @ root, torch.linalg.inv(damped), atol=1e-5)


def test_few_samples_are_enough_for_the_algorithm_to_finish() -> None:
    weight = case()[0]
    result = quantize_matrix(weight, hessian_of(correlated_inputs(3, 128)), GptqOptions(group_size=32))
    assert bool(torch.isfinite(result.matrix.scales).all())


def test_hopeless_hessian_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(QuantizationError, match="calibration text"):
        inverse_cholesky(torch.tensor([[1.0, 100.0], [100.0, 1.0]]), 0.01)


def test_values_that_are_not_finite_are_refused() -> None:
    weight, hessian = case()
    weight[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match="not finite"):
        quantize_matrix(weight, hessian, GptqOptions(group_size=32))


def test_scales_beyond_fp16_are_refused() -> None:
    with pytest.raises(QuantizationError, match="fp16 holds"):
        storable_scale(torch.tensor([1e6]), 4)


@pytest.mark.parametrize(("sizes", "expected"), [([256, 512], 128), ([576, 1536], 64), ([96, 32], 32)])
def test_default_group_size_is_the_largest_that_divides_every_input(sizes: list[int], expected: int) -> None:
    assert choose_group_size(sizes, None) == expected


def test_group_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(QuantizationError, match=r"group size 128 .*\[576, 1536\].*these do: 64, 32"):
        choose_group_size([576, 1536], 128)


def test_inputs_that_no_default_divides_ask_for_a_group_size() -> None:
    with pytest.raises(QuantizationError, match="--group-size"):
        choose_group_size([40], None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 3), ("group_size", 0), ("group_size", -2), ("refine_sweeps", -1), ("damp", 0.0), ("damp", float("nan"))],
)
def test_impossible_options_are_refused(field: str, value: float) -> None:
    with pytest.raises(QuantizationError):
        GptqOptions(**{field: value})  # pyright: ignore[reportArgumentType]
