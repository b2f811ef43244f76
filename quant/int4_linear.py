"""Multiplying by a quantised matrix: the plain twin, and the fast CPU path chosen by a probe at start-up.

`QuantizedLinear` is the module that stands in a model where an `nn.Linear` stood; it is the reference. A `LinearKernel`
is what an engine prepares from it once and then calls at every step.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn

from quant.errors import QuantizationError
from quant.method.matrix import SHUFFLED_GROUPS, QuantizedMatrix
from quant.native.large_pages import LargePages
from quant.native.linear import NativeLinear, is_native_right, why_not_native

logger = logging.getLogger(__name__)

INT4PACK_GROUP_SIZES = (32, 64, 128, 256)
INT4PACK_ROW_MULTIPLE = 16
# The operator's code 8 stands for zero: value = (code - 8) * scale + offset.
INT4PACK_CENTRE = 8
# With other capabilities the operator is a scalar loop, 20 times slower than a bf16 product of dequantised weights.
INT4PACK_CPU_CAPABILITIES = ("AVX2", "AVX512")
# From this many rows on, a bf16 product is faster than two packed ones.
SPLIT_DENSE_FROM_ROWS = 8
# The product is accumulated in fp32 and rounded once to bf16: about 0.0017 of its norm, never more than 2**-9 + noise.
INT4PACK_RELATIVE_TOLERANCE = 2.6e-3


class KernelName(StrEnum):
    PLAIN = "plain"
    TORCH_INT4PACK = "torch_int4pack"
    NATIVE = "native_int8"  # int8 activations
    # Plain weights rounded while they load: `quant.bitsandbytes_linear`.
    BITSANDBYTES_NF4 = "bitsandbytes_nf4"
    BITSANDBYTES_INT8 = "bitsandbytes_int8"


class LinearKernel(Protocol):
    """x (rows, in) -> (rows, out), both in the same floating type."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class QuantizedLinear(nn.Module):
    """x @ weight.T + bias with the weight dequantised at every call, in x's type. Slow and plainly right: the twin."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (matrix.out_features,):
            raise ValueError(f"bias must be ({matrix.out_features},); found {tuple(bias.shape)}")
        self.matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.matrix.in_features

    @property
    def out_features(self) -> int:
        return self.matrix.out_features

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.matrix.dequantize(x.dtype), bias)

    def extra_repr(self) -> str:
        matrix = self.matrix
        return f"in={matrix.in_features}, out={matrix.out_features}, bits={matrix.bits}, group_size={matrix.group_size}"


class PlainKernel:
    """The dequantised weight held in `dtype`: any bits, any group size, any machine."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        self._weight = matrix.dequantize(dtype)
        self._bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self._weight.dtype), self._weight, self._bias).to(x.dtype)


class Int4PackKernel:
    """torch's packed 4-bit product. Activations are multiplied in bf16: with fp32 ones the operator is scalar."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None) -> None:
        reason = why_not_int4pack(matrix) if matrix.bits == 4 else f"it takes 4 bits, not {matrix.bits}"
        if reason is not None:
            raise QuantizationError(f"this matrix cannot take torch's packed 4-bit product: {reason}")
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        self._group_size = matrix.group_size
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.codes.to(torch.int32), 1)
        self._scales_and_offsets = int4pack_scales_and_offsets(matrix)
        self._bias = None if bias is None else bias.detach().to(torch.bfloat16)

    def set_offsets(self, offsets: Tensor) -> None:
        """Replace what is added to every weight of a group. offsets: (out, groups) float32."""
        self._scales_and_offsets[..., 1] = offsets.t().to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16), self._packed, self._group_size, self._scales_and_offsets
        )
        if self._bias is not None:
            product += self._bias
        return product.to(x.dtype)


class SplitInt4PackKernel:
    """An 8-bit matrix as one packed 4-bit product of twice the inputs for few rows, and as a bf16 one for many.

    (16 * upper + lower - zero) * scale = (upper - 8) * 16 * scale + (136 - zero) * scale  +  (lower - 8) * scale,
    with `upper` and `lower` the halves of every code. Few rows are bound by the bytes of the weights, of which this
    reads half as many as bf16; many rows by arithmetic, at which bf16 is five times faster than two packed products.
    The scale is rounded to bf16: at the far end of the grid a quarter of an 8-bit step.
    """

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, *, for_many_rows: bool = True) -> None:
        """`for_many_rows` False saves the bf16 copy: for callers that have their own way with many rows."""
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        self._halves = Int4PackKernel(split_codes(matrix), bias)
        offsets = (136 - matrix.zeros.to(torch.float32)) * matrix.scales.to(torch.bfloat16).to(torch.float32)
        self._halves.set_offsets(torch.cat((offsets, torch.zeros_like(offsets)), dim=1))
        self._dense = PlainKernel(matrix, bias, torch.bfloat16) if for_many_rows else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._dense is not None and x.shape[0] >= SPLIT_DENSE_FROM_ROWS:
            return self._dense(x)
        return self._halves(torch.cat((x, x), dim=1))


def split_codes(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The upper halves of 8-bit codes with 16 times the scale, then the lower halves with the scale, side by side.

    (out, in) at 8 bits becomes (out, 2 * in) at 4 bits, both halves around 8.
    """
    if matrix.bits != 8:
        raise QuantizationError(f"only 8-bit matrices are split, not {matrix.bits}-bit ones")
    if matrix.group_of_input is not None:
        raise QuantizationError(f"only matrices whose inputs are grouped in order are split: {SHUFFLED_GROUPS}")
    return QuantizedMatrix(
        codes=torch.cat((matrix.codes >> 4, matrix.codes & 15), dim=1),
        scales=torch.cat((matrix.scales * 16, matrix.scales), dim=1),
        zeros=torch.full_like(torch.cat((matrix.zeros, matrix.zeros), dim=1), INT4PACK_CENTRE),
        bits=4,
        group_size=matrix.group_size,
    )


def why_not_int4pack(matrix: QuantizedMatrix) -> str | None:
    """None if torch's packed product takes this matrix (an 8-bit one as two of 4 bits), else the reason."""
    if matrix.bits not in (4, 8):
        return f"it takes 4 bits, or 8 as two products, not {matrix.bits}"
    if matrix.group_of_input is not None:
        return SHUFFLED_GROUPS
    if matrix.group_size not in INT4PACK_GROUP_SIZES:
        return f"it takes group sizes {INT4PACK_GROUP_SIZES}, not {matrix.group_size}"
    if matrix.out_features % INT4PACK_ROW_MULTIPLE:
        return f"it takes multiples of {INT4PACK_ROW_MULTIPLE} outputs, not {matrix.out_features}"
    return None


def int4pack_scales_and_offsets(matrix: QuantizedMatrix) -> Tensor:
    """(groups, out, 2) bf16: the scale, and what the operator adds: (8 - zero) * scale, both rounded to bf16.

    Our own scales are representable in bf16, and a symmetric offset is 0, so nothing is lost; scales of other
    quantisers are rounded by up to 2**-9.
    """
    scales = matrix.scales.to(torch.bfloat16)
    offsets = (INT4PACK_CENTRE - matrix.zeros.to(torch.float32)) * scales.to(torch.float32)
    return torch.stack([scales.t(), offsets.to(torch.bfloat16).t()], dim=-1).contiguous()


def int4pack_twin_weight(matrix: QuantizedMatrix) -> Tensor:
    """(out, in) float32: the weight that the packed product multiplies by, from the same rounded scales and offsets."""
    scales, offsets = int4pack_scales_and_offsets(matrix).to(torch.float32).unbind(-1)  # each (groups, out)
    grouped = matrix.codes.view(matrix.out_features, -1, matrix.group_size).to(torch.float32) - INT4PACK_CENTRE
    weight = grouped * scales.t().unsqueeze(-1) + offsets.t().unsqueeze(-1)
    return weight.view(matrix.out_features, matrix.in_features)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in float32."""
    expected = expected.to(torch.float32)
    return float((found.to(torch.float32) - expected).norm() / expected.norm())


def probe_kernel(*, rounds_activations: bool = False) -> KernelName:
    """Choose the fastest product that this machine runs correctly, and say in one log line which and why.

    rounds_activations: whether a product may round its input to int8, group by group.
    """
    if rounds_activations and is_native_right():
        name, reason = KernelName.NATIVE, "agrees_with_twin"
    else:
        name, reason = _probe_int4pack()
    logger.info("int4_kernel_chosen name=%s reason=%s", name.value, reason)
    return name


def build_kernel(
    matrix: QuantizedMatrix,
    bias: Tensor | None,
    name: KernelName,
    *,
    plain_dtype: torch.dtype = torch.float32,
    memory: LargePages | None = None,
) -> LinearKernel:
    """The kernel `name` for this matrix; the plain one, in `plain_dtype`, where `name` does not take it.

    memory: where a native kernel's weights go, beside those of the model's other linears.
    """
    if name is KernelName.NATIVE and why_not_native(matrix) is None:
        return NativeLinear(matrix, bias, memory)
    if name is KernelName.TORCH_INT4PACK and why_not_int4pack(matrix) is None:
        return Int4PackKernel(matrix, bias) if matrix.bits == 4 else SplitInt4PackKernel(matrix, bias)
    return PlainKernel(matrix, bias, plain_dtype)


def _probe_int4pack() -> tuple[KernelName, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INT4PACK_CPU_CAPABILITIES:
        return KernelName.PLAIN, f"cpu_capability_{capability}_has_no_vectorised_operator"
    matrix, x = _probe_case()
    try:
        found = Int4PackKernel(matrix, None)(x)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return KernelName.PLAIN, f"operator_failed_{type(error).__name__}"
    error = relative_error(found, x.to(torch.float32) @ int4pack_twin_weight(matrix).t())
    if not error <= INT4PACK_RELATIVE_TOLERANCE:
        return KernelName.PLAIN, f"operator_differs_from_twin_by_{error:.1e}"
    return KernelName.TORCH_INT4PACK, f"agrees_with_twin_to_{error:.1e}_on_{capability}"


def _probe_case() -> tuple[QuantizedMatrix, Tensor]:
    """A small matrix with every code and zero point in it, and five rows of activations."""
    generator = torch.Generator().manual_seed(0)
    out_features, in_features, group_size = 32, 128, 32
    groups = (out_features, in_features // group_size)
    matrix = QuantizedMatrix(
        codes=torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(groups, generator=generator) * 0.01 + 0.005).to(torch.float16).to(torch.float32),
        zeros=torch.randint(1, 16, groups, dtype=torch.uint8, generator=generator),
        bits=4,
        group_size=group_size,
    )
    return matrix, torch.randn((5, in_features), generator=generator).to(torch.bfloat16)
