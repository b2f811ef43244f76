"""A model directory read one decoder layer at a time, for what must never have a whole model in memory.

The reference is `serving.model.weights.load_decoder`: the same modules with the same values, all at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor, nn

from quant.errors import CheckpointError
from quant.formats.autogptq import (
    PACKED_SUFFIXES,
    gptq_settings,
    is_packed_tensor,
    open_packed,
    unpack_linear,
)
from quant.formats.checkpoint_names import checkpoint_names
from quant.formats.tensor_files import TensorFile
from quant.int4_linear import QuantizedLinear
from quant.walk.ends import EMBEDDINGS, HEAD
from quant.walk.tables import CodedTable, HeldTable, StoredTable, Table
from serving.model.transformer import Decoder, DecoderLayer
from serving.model.weights import load_spec, locate_tensors, read_config

# Rows of the head that are converted to float32 at a time.
HEAD_RUN_ROWS: Final = 2048
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
_TABLES: Final = (EMBEDDINGS, HEAD)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one of the decoder's tensors lies. `part`: 0, 1, 2 for the queries, keys, values of a fused one."""

    file: TensorFile
    stored: str
    part: int | None

    @property
    def num_bytes(self) -> int:
        stored = self.file.tensors[self.stored]
        return (stored.end - stored.start) // (1 if self.part is None else 3)


class DirectoryLayers:
    """`quant.walk.layer_source.LayerSource` over a plain or a GPTQ directory."""

    def __init__(self, directory: Path) -> None:
        """Reads headers only. Raises CheckpointError for tensors that are missing or not the model's."""
        self._directory = directory
        self._spec = load_spec(directory)
        self._settings = gptq_settings(directory)
        self._names = checkpoint_names(read_config(directory))
        self._places = self._locate(locate_tensors(directory))
        self._refuse_other_names()
        self._ends = self._read_ends()
        self._head: Table | None = None

    @property
    def num_layers(self) -> int:
        return self._spec.num_layers

    @property
    def hidden_size(self) -> int:
        return self._spec.hidden_size

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab_size

    @property
    def max_positions(self) -> int:
        return self._spec.max_positions

    @property
    def is_tied(self) -> bool:
        return self._spec.tied_embeddings

    @property
    def head_bytes(self) -> int:
        return sum(place.num_bytes for name, place in self._places.items() if _module(name) == self._head_name)

    def layer(self, index: int) -> nn.Module:
        layer = self._empty_layer()
        prefix = f"model.layers.{index}."
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and f"{prefix}{name}.qweight" in self._places:
                self._insert_quantized(layer, prefix, name, module)
        self._fill(layer, prefix, layer.state_dict())
        return layer.eval().requires_grad_(False)

    def outline(self) -> nn.Module:
        return self._empty_layer()

    def layer_bytes(self, index: int) -> int:
        return sum(self._places[name].num_bytes for name in self._places if name.startswith(f"model.layers.{index}."))

    def end_bytes(self) -> int:
        return sum(place.num_bytes for name, place in self._places.items() if not name.startswith("model.layers."))

    def table(self, name: str) -> Table:
        """Codes are read, and stay packed; nothing is read of a plain table."""
        expected = (self._spec.vocab_size, self._spec.hidden_size)
        if f"{name}.qweight" in self._places:
            assert self._settings is not None
            packed = open_packed(name, self._packed_tensors(name), self._settings)
            self._require_shape(name, packed.shape, expected)
            return CodedTable(packed.matrix, packed.shape)
        place = self._floats(f"{name}.weight")
        self._require_shape(f"{name}.weight", place.file.tensors[place.stored].shape, expected)
        return StoredTable(place.file, place.stored)

    def embed(self, ids: Tensor, table: Table | None = None) -> Tensor:
        """Only those rows of the embeddings are converted that occur; of plain ones, only those are read."""
        occurring, position = ids.unique(return_inverse=True)
        rows = (self.table(EMBEDDINGS) if table is None else table).gather(occurring)
        embeddings = self._ends.model.embed_tokens
        embeddings.weight = nn.Parameter(rows, requires_grad=False)
        embedded = self._ends.embed(position)
        embeddings.weight = nn.Parameter(rows[:0].clone(), requires_grad=False)  # or the rows would stay
        return embedded

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._ends.rotary(positions)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self._ends.final_norm(hidden)

    def logits(self, hidden: Tensor, table: Table | None = None) -> Tensor:
        if self._head is None and table is None:
            own = self.table(self._head_name)
            self._head = HeldTable(own.file.read(own.name)) if isinstance(own, StoredTable) else own
        table = self._head if table is None else table
        assert table is not None
        logits = hidden.new_empty((*hidden.shape[:-1], self.vocab_size))
        for first in range(0, self.vocab_size, HEAD_RUN_ROWS):
            last = min(first + HEAD_RUN_ROWS, self.vocab_size)
            logits[..., first:last] = hidden @ table.rows(first, last).t()
        return logits if self._spec.logit_scale == 1.0 else logits.mul_(self._spec.logit_scale)

    @property
    def _head_name(self) -> str:
        return EMBEDDINGS if self.is_tied else HEAD

    def _locate(self, file_of_tensor: Mapping[str, Path]) -> dict[str, _Place]:
        """By the decoder's names, without tensors that follow from the config."""
        files = {path: TensorFile(path) for path in sorted(set(file_of_tensor.values()))}
        places: dict[str, _Place] = {}
        for stored, path in file_of_tensor.items():
            if stored not in files[path].tensors:
                raise CheckpointError(f"{path} lacks {stored}, which the index says it holds")
            ours = () if self._names.is_derived(stored) else self._names.ours(stored)
            for part, name in enumerate(ours):
                places[name] = _Place(files[path], stored, part if len(ours) > 1 else None)
        return places

    def _refuse_other_names(self) -> None:
        tensors = Decoder(self._spec, device="meta").state_dict().keys()
        packed = {f"{_module(name)}.weight" for name in self._places if name.endswith(".qweight")}
        expected = tensors - packed
        # A tied head is sometimes stored too; the embeddings are what counts, as in transformers.
        ignored = {f"{HEAD}.weight"} if self.is_tied else set[str]()
        for name, place in self._places.items():
            is_known = name in expected or name in ignored
            if self._settings is not None and is_packed_tensor(name):
                is_known = f"{_module(name)}.weight" in tensors
            if not is_known and not self._is_zero_bias(name):
                raise CheckpointError(f"{self._directory} has {place.stored}, which the model lacks")
        for name in sorted(expected):
            self._place(name)

    def _is_zero_bias(self, name: str) -> bool:
        """Some GPTQ writers store a bias of zeros for linears that have none."""
        return self._settings is not None and name.endswith("_proj.bias") and not bool(self._read(name).any())

    def _empty_layer(self) -> DecoderLayer:
        return DecoderLayer(self._spec, dtype=torch.float32, device="meta")

    def _read_ends(self) -> Decoder:
        """Everything but layers and the tables of the vocabulary, in float32."""
        ends = Decoder(replace(self._spec, num_layers=1), device="meta")
        ends.model.layers = nn.ModuleList()
        self._fill(ends, "", [name for name in ends.state_dict() if _module(name) not in _TABLES])
        for parameter in ends.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(torch.float32)
        return ends.eval().requires_grad_(False)

    def _insert_quantized(self, layer: nn.Module, prefix: str, name: str, linear: nn.Linear) -> None:
        full = prefix + name
        stored = self._place(f"{full}.qweight").stored.removesuffix(".qweight")
        assert self._settings is not None
        fused = unpack_linear(stored, self._packed_tensors(full), self._settings)
        matrix = dict(self._names.split_matrix(stored, fused))[full]
        self._require_shape(full, (matrix.out_features, matrix.in_features), (linear.out_features, linear.in_features))
        bias = None if cast("Tensor | None", linear.bias) is None else self._read(f"{full}.bias")
        parent, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(parent), attribute, QuantizedLinear(matrix, bias))

    def _packed_tensors(self, full: str) -> dict[str, Tensor]:
        """Of the linear or table of this name, by the last part of their names; of a fused one, the whole."""
        places = {suffix[1:]: self._places.get(full + suffix) for suffix in PACKED_SUFFIXES}
        return {part: place.file.read(place.stored) for part, place in places.items() if place is not None}

    def _fill(self, module: nn.Module, prefix: str, names: Iterable[str]) -> None:
        expected = module.state_dict()
        tensors = {name: self._read(prefix + name) for name in names}
        for name, tensor in tensors.items():
            self._require_shape(prefix + name, tensor.shape, expected[name].shape)
        module.load_state_dict(tensors, strict=False, assign=True)

    def _require_shape(self, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(found) != tuple(expected):
            raise CheckpointError(
                f"{self._directory}: {name} is {tuple(found)}; config.json makes it {tuple(expected)}"
            )

    def _read(self, name: str) -> Tensor:
        place = self._floats(name)
        tensor = place.file.read(place.stored)
        return tensor if place.part is None else self._names.take_part(tensor, place.part)

    def _floats(self, name: str) -> _Place:
        """Where a plain tensor lies. Raises CheckpointError if it has another type."""
        place = self._place(name)
        if place.file.dtype(place.stored) not in _FLOATS:
            found = place.file.tensors[place.stored].dtype
            raise CheckpointError(f"{place.file.path}: {place.stored} is {found}; F32, F16 and BF16 are read")
        return place

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise CheckpointError(f"{self._directory} lacks tensors: {self._names.stored(name).name}")
        return self._places[name]


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
