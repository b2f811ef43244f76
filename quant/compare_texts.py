"""The result of a quantisation beside its source on each held-out text: what the report says of quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from quant.measure import PlainPaths, WindowLogits, compare
from quant.progress import ProgressSink
from quant.report import TextComparison
from quant.texts import HeldOut


def compare_texts(
    texts: Sequence[HeldOut], paths: PlainPaths, serve: WindowLogits | None, progress: ProgressSink
) -> tuple[TextComparison, ...]:
    """paths: carried over the windows of all texts, one text after another. serve: None to leave that path out."""
    compared: list[TextComparison] = []
    first = 0
    for text in texts:
        compared.append(_compare_text(text, first, paths, serve, progress))
        first += text.windows.shape[0]
    return tuple(compared)


def _compare_text(
    text: HeldOut, first: int, paths: PlainPaths, serve: WindowLogits | None, progress: ProgressSink
) -> TextComparison:
    """first: the index of the text's first window in `paths`."""
    others: list[Callable[[int], Tensor]] = [
        lambda window: paths.result.logits(first + window),
        lambda window: paths.nearest.logits(first + window),
    ]
    if serve is not None:
        others.append(lambda window: serve(text.windows[window]))
    perplexity, agreements = compare(
        text.windows,
        lambda window: paths.source.logits(first + window),
        others,
        progress,
        f"Comparing predictions on {text.file.name}",
    )
    return TextComparison(
        name=text.file.name,
        sha256=text.file.sha256,
        tokens=text.windows.numel(),
        source_perplexity=perplexity,
        plain=agreements[0],
        round_to_nearest=agreements[1],
        served=agreements[2] if serve is not None else None,
    )
