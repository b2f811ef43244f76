"""Logits of many windows on the path that serves, with one layer in memory at a time: how the quantisation report
measures a model that would not fit as a whole.

The same kernels on the same chunks as `serving.engine.logits`, its twin, which has the whole model: equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.progress import ProgressSink
from quant.report.measure import RowLogits
from serving.engine.kv_blocks import KVCache, KVLayout, blocks_for
from serving.engine.logits import CHUNK_TOKENS, prefill_chunks
from serving.engine.prepare import PreparedModel, prepare, prepare_one_layer
from serving.engine.runner import carry_chunks, embed_rows, finish_chunks
from serving.model.layer_source import DirectoryLayers
from serving.model.transformer import Decoder
from serving.model.weights import load_decoder

_DTYPE = torch.bfloat16


def serve_windows(directory: Path, windows: Tensor, progress: ProgressSink, stage: str) -> RowLogits:
    """Carry windows (count, tokens) of ids through the model in `directory`; what is left in memory is its head.

    Returns (window, rows) -> logits (rows, vocabulary) float32. Raises CheckpointError as loading the model would.
    """
    with torch.inference_mode():
        ends = load_decoder(directory, dtype=_DTYPE, with_layers=False)
        model = prepare(ends, exact=False)
        path = _carry(model, ends, directory, windows, progress, stage)
        if path is None:
            # One layer without a native form, and the engine takes the native step for none.
            path = _carry(replace(model, native=None), ends, directory, windows, progress, stage)
    assert path is not None
    return path.logits


class _ServedPath:
    """The residual stream of all windows at the entrance of the next layer."""

    def __init__(self, ends: PreparedModel, windows: Tensor) -> None:
        self._windows = windows
        self._hidden = torch.stack([embed_rows(ends, ids) for ids in windows])  # (count, tokens, hidden) float32
        self._head: Callable[[Tensor], Tensor] = ends.head
        # One for all windows: what a window reads of it, it has written before.
        self._cache_layout = KVLayout(1, ends.spec.num_kv_heads, ends.spec.head_dim, ends.dtype)

    def advance(self, layer: PreparedModel) -> None:
        """Through the one layer of a model."""
        cache = self._cache()
        for ids, hidden in zip(self._windows, self._hidden, strict=True):
            for chunk in prefill_chunks(ids):
                carry_chunks(layer, cache, [chunk], hidden[chunk.start : chunk.end])

    def finish(self, ends: PreparedModel) -> None:
        """After the last layer."""
        cache = self._cache()
        normed = torch.empty_like(self._hidden, dtype=ends.dtype)
        for ids, hidden, into in zip(self._windows, self._hidden, normed, strict=True):
            for chunk in prefill_chunks(ids):
                rows = slice(chunk.start, chunk.end)
                into[rows] = finish_chunks(ends, cache, [chunk], hidden[rows])
        self._hidden = normed

    def logits(self, window: int, rows: slice) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self._head(part) for part in self._hidden[window, rows].split(CHUNK_TOKENS)])

    def _cache(self) -> KVCache:
        return KVCache(self._cache_layout, blocks_for(self._windows.shape[1]))


def _carry(
    model: PreparedModel, ends: Decoder, directory: Path, windows: Tensor, progress: ProgressSink, stage: str
) -> _ServedPath | None:
    """model: prepared from `ends`, a decoder without layers. None if it has a native step and one layer has not."""
    source = DirectoryLayers(directory)
    path = _ServedPath(model, windows)
    for index in range(source.num_layers):
        progress.update(stage, index, source.num_layers)
        ends.model.layers = nn.ModuleList([source.layer(index).to(_DTYPE)])
        layer = prepare_one_layer(model, ends, index)
        ends.model.layers = nn.ModuleList()
        if model.native is not None and layer.native is None:
            return None
        path.advance(layer)
        del layer  # before the next one is read
    path.finish(model)
    progress.update(stage, source.num_layers, source.num_layers)
    return path
