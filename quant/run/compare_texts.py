"""The result of a quantisation beside its source on each held-out text: what the report says of quality."""

from __future__ import annotations

from collections.abc import Sequence

from quant.progress import ProgressSink
from quant.report.measure import PlainPaths, RowLogits, compare
from quant.report.quantization_report import TextComparison
from quant.run.texts import HeldOut


def compare_texts(
    texts: Sequence[HeldOut], paths: PlainPaths, served: RowLogits | None, progress: ProgressSink
) -> tuple[TextComparison, ...]:
    """paths, served: carried over the windows of all texts, one text after another. served: None to leave it out."""
    compared: list[TextComparison] = []
    first = 0
    for text in texts:
        compared.append(_compare_text(text, first, paths, served, progress))
        first += text.windows.shape[0]
    return tuple(compared)


def _compare_text(
    text: HeldOut, first: int, paths: PlainPaths, served: RowLogits | None, progress: ProgressSink
) -> TextComparison:
    """first: the index of the text's first window in `paths`."""
    others = [_from(first, paths.result.logits), _from(first, paths.nearest.logits)]
    if served is not None:
        others.append(_from(first, served))
    perplexity, agreements = compare(
        text.windows,
        _from(first, paths.source.logits),
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
        served=agreements[2] if served is not None else None,
    )


def _from(first: int, logits: RowLogits) -> RowLogits:
    """The same with windows counted from `first`."""
    return lambda window, rows: logits(first + window, rows)
