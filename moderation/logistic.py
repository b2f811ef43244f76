"""Logistic regression on sparse features and Platt's calibration. Training only; SciPy is imported when called.

Deterministic: L-BFGS from zero, on one thread, so one machine repeats the weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from moderation.errors import ModerationError
from moderation.features import FeatureOptions, hash_features
from quant.progress import ProgressSink

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["build_matrix", "fit_blend", "fit_logistic", "fit_platt"]

FloatArray = npt.NDArray[np.float64]


def build_matrix(texts: Sequence[str], options: FeatureOptions, progress: ProgressSink) -> csr_matrix:
    """(len(texts), 2**bucket_bits) float64."""
    sparse = _scipy_sparse()
    indices: list[npt.NDArray[np.int64]] = []
    values: list[npt.NDArray[np.float32]] = []
    ends = np.zeros(len(texts) + 1, np.int64)
    for i, text in enumerate(texts):
        features = hash_features(text, options)
        indices.append(features.indices)
        values.append(features.values)
        ends[i + 1] = ends[i] + len(features.indices)
        if i % 1000 == 0 or i + 1 == len(texts):
            progress.update("counting n-grams", i + 1, len(texts))
    shape = (len(texts), 1 << options.bucket_bits)
    # 32-bit indices halve the memory that every product of the solver walks through.
    return sparse.csr_matrix(
        (np.concatenate(values).astype(np.float64), np.concatenate(indices).astype(np.int32), ends.astype(np.int32)),
        shape=shape,
    )


def fit_logistic(
    matrix: csr_matrix,
    labels: FloatArray,
    row_weights: FloatArray,
    *,
    bucket_bits: int,
    l2: float,
    iterations: int,
    progress: ProgressSink,
) -> tuple[FloatArray, float]:
    """Minimises weighted mean log loss + l2/2 |w|². Returns (weights, bias); the bias is not penalised.

    matrix: (rows, 2**bucket_bits); labels: (rows,) 0.0 or 1.0; row_weights: (rows,) > 0.
    """
    num_buckets = 1 << bucket_bits
    transposed = matrix.T.tocsr()
    shares = row_weights / row_weights.sum()
    signs = np.where(labels > 0.5, 1.0, -1.0)

    def loss_and_gradient(point: FloatArray) -> tuple[float, FloatArray]:
        weights = point[:num_buckets]
        margins = signs * (matrix @ weights + point[num_buckets])
        loss = float(np.sum(shares * np.logaddexp(0.0, -margins)) + 0.5 * l2 * np.sum(weights * weights))
        slope = -signs * shares / (1.0 + np.exp(np.minimum(margins, 500.0)))
        return loss, np.append(transposed @ slope + l2 * weights, slope.sum())

    found = _minimise(loss_and_gradient, num_buckets + 1, iterations, progress)
    return found[:num_buckets], float(found[num_buckets])


def fit_platt(logits: FloatArray, labels: FloatArray) -> tuple[float, float]:
    """(slope, intercept) so that sigmoid(slope * logit + intercept) is calibrated on these held-out rows.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", with his smoothed targets.
    """
    slopes, intercept = fit_blend(logits[:, None], labels)
    return float(slopes[0]), intercept


def fit_blend(
    logits: FloatArray, labels: FloatArray, row_weights: FloatArray | None = None
) -> tuple[FloatArray, float]:
    """Platt's fit for several logits at once: sigmoid(logits @ slopes + intercept).

    logits: (rows, classifiers); labels: (rows,) 0 or 1; row_weights: (rows,), one each if None.
    """
    num_harmful = float(labels.sum())
    high = (num_harmful + 1.0) / (num_harmful + 2.0)
    low = 1.0 / (len(labels) - num_harmful + 2.0)
    targets = np.where(labels > 0.5, high, low)
    importance = np.ones(len(labels)) if row_weights is None else row_weights
    inputs = np.column_stack([logits, np.ones(len(labels))])
    point = np.append(np.ones(logits.shape[1]) / logits.shape[1], 0.0)
    for _ in range(200):
        p = 1.0 / (1.0 + np.exp(-np.clip(inputs @ point, -60.0, 60.0)))
        gradient = inputs.T @ (importance * (p - targets))
        curvature = importance * p * (1.0 - p) + 1e-12
        step = np.linalg.solve((inputs * curvature[:, None]).T @ inputs + 1e-9 * np.eye(len(point)), gradient)
        # Steps at most one unit long: plain Newton may overshoot where the scores separate the labels well.
        step *= min(1.0, 1.0 / float(np.linalg.norm(step) + 1e-12))
        point = point - step
        if np.abs(step).max() < 1e-10:
            break
    return point[:-1].astype(np.float64), float(point[-1])


def _minimise(
    function: Callable[[FloatArray], tuple[float, FloatArray]], size: int, iterations: int, progress: ProgressSink
) -> FloatArray:
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    done = 0

    def after_iteration(_: FloatArray) -> None:
        nonlocal done
        done += 1
        progress.update("fitting weights", done, iterations)

    with threadpool_limits(limits=1):
        result = minimize(
            function,
            np.zeros(size),
            jac=True,
            method="L-BFGS-B",
            callback=after_iteration,
            options={"maxiter": iterations, "maxcor": 10},
        )
    progress.update("fitting weights", iterations, iterations)
    return cast("FloatArray", result.x)


def _scipy_sparse():  # noqa: ANN202 - a module
    try:
        from scipy import sparse
    except ImportError:
        raise ModerationError("training needs SciPy; install it with: pip install 'causerie[train]'") from None
    return sparse
