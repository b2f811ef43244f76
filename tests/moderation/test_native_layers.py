"""The native layers against the plain ones, here and, in a second run, on the AVX2 code paths."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moderation import encoder_layers, native_layers
from moderation.encoder_layers import EncoderShape, FloatArray, LayerWeights, Matrix, PlainLayers, choose_layers
from moderation.native_layers import NativeLayers, why_not_native
from quant.native.library import load_library

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(load_library() is None, reason="no native kernels on this machine"),
]

SHAPE = EncoderShape(vocab=10, hidden=64, layers=3, heads=4, inner=96, positions=128, eps=1e-12)
ENDS = [1, 18, 18 + 128, 18 + 128 + 33]


def matrix(outs: int, ins: int, random: np.random.Generator) -> Matrix:
    codes = random.integers(-127, 128, (outs, ins)).astype(np.int8)
    scales = (random.random(outs) * 4e-3 + 5e-4).astype(np.float32)
    return Matrix(codes, scales, random.standard_normal(outs).astype(np.float32))


def norm(random: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    weight = random.random(SHAPE.hidden) + 0.5
    return weight.astype(np.float32), (random.standard_normal(SHAPE.hidden) * 0.1).astype(np.float32)


def make_layers(seed: int = 0) -> list[LayerWeights]:
    random = np.random.default_rng(seed)
    hidden, inner = SHAPE.hidden, SHAPE.inner
    return [
        LayerWeights(
            qkv=matrix(3 * hidden, hidden, random),
            out=matrix(hidden, hidden, random),
            attention_norm=norm(random),
            up=matrix(inner, hidden, random),
            down=matrix(hidden, inner, random),
            output_norm=norm(random),
        )
        for _ in range(SHAPE.layers)
    ]


def make_states(tokens: int) -> FloatArray:
    return np.random.default_rng(1).standard_normal((tokens, SHAPE.hidden)).astype(np.float32)


def relative_error(found: FloatArray, expected: FloatArray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_native_layers_compute_what_plain_ones_do_up_to_rounded_activations() -> None:
    states, layers = make_states(ENDS[-1]), make_layers()
    before = states.copy()

    found, expected = NativeLayers(layers, SHAPE)(states, ENDS), PlainLayers(layers, SHAPE)(states, ENDS)

    assert relative_error(found, expected) < 0.02
    assert np.array_equal(states, before)


def test_the_bound_notices_one_wrong_matrix() -> None:
    states, layers, others = make_states(ENDS[-1]), make_layers(), make_layers(seed=3)
    wrong = [layers[0], replace(layers[1], down=others[1].down), layers[2]]

    assert relative_error(NativeLayers(wrong, SHAPE)(states, ENDS), PlainLayers(layers, SHAPE)(states, ENDS)) > 0.05


def test_a_text_alone_gives_the_same_bits_as_in_company() -> None:
    states, native = make_states(ENDS[-1]), NativeLayers(make_layers(), SHAPE)

    together = native(states, ENDS)

    starts = [0, *ENDS[:-1]]
    alone = [native(states[start:end], [end - start]) for start, end in zip(starts, ENDS, strict=True)]
    assert np.array_equal(together, np.concatenate(alone))


def test_texts_that_do_not_fit_are_refused() -> None:
    native = NativeLayers(make_layers(), SHAPE)

    for ends in ([129], [2, 2, 5], [4]):
        with pytest.raises(ValueError, match="texts end at"):
            native(make_states(max(5, ends[-1])), ends)


def test_structs_mirror_the_native_ones() -> None:
    library = load_library()
    assert library is not None
    library.causerie_encoder_struct_size.restype = ctypes.c_int64
    sizes = [ctypes.sizeof(native_layers.CLayer), ctypes.sizeof(native_layers.CModel)]
    assert sizes == [library.causerie_encoder_struct_size(which) for which in (0, 1)]


def test_shapes_that_the_kernels_do_not_take_are_computed_plainly() -> None:
    odd = EncoderShape(vocab=10, hidden=96, layers=1, heads=12, inner=96, positions=128, eps=1e-12)

    assert "multiples" in (why_not_native(odd) or "")
    assert isinstance(choose_layers([], odd), PlainLayers)
    assert isinstance(choose_layers(make_layers(), SHAPE), NativeLayers)


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pack = native_layers.pack_codes

    def pack_wrongly(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
        return pack(np.roll(codes, 1, axis=1), bits)

    monkeypatch.setattr(native_layers, "pack_codes", pack_wrongly)

    assert isinstance(choose_layers(make_layers(), SHAPE), PlainLayers)
    assert "encoder_native available=no" in caplog.text


def test_a_machine_without_a_library_computes_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layers, "load_library", lambda: None)

    assert isinstance(choose_layers(make_layers(), SHAPE), PlainLayers)
    with pytest.raises(RuntimeError, match="no native library"):
        NativeLayers(make_layers(), SHAPE)


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="already running on a chosen capability")
def test_these_pass_on_the_avx2_code_paths() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_the_check_compares_two_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that lets texts see each other must fail it."""
    layers = make_layers()

    class Leaking(NativeLayers):
        def __call__(self, states: FloatArray, ends: list[int]) -> FloatArray:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().__call__(states, ends[-1:])

    monkeypatch.setattr(native_layers, "NativeLayers", Leaking)

    assert isinstance(choose_layers(layers, SHAPE), PlainLayers)
    assert encoder_layers.LARGEST_ERROR < 0.1
