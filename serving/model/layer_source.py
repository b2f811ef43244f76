"""A model directory read one decoder layer at a time, for what must never have a whole model in memory.

The reference is `serving.model.weights.load_decoder`: the same modules with the same values, all at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor, nn

from quant.errors import CheckpointError
from quant.formats.autogptq import PACKED_SUFFIXES, gptq_settings, is_packed_tensor, unpack_linear
from quant.formats.checkpoint_names import checkpoint_names
from quant.formats.tensor_files import TensorFile
from quant.int4_linear import QuantizedLinear
from serving.model.transformer import Decoder, DecoderLayer
from serving.model.weights import load_spec, locate_tensors, read_config

# Rows of the head that are converted to float32 at a time.
HEAD_RUN_ROWS: Final = 8192
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"


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
    """`quant.layer_source.LayerSource` over a plain or a GPTQ directory."""

    def __init__(self, directory: Path) -> None:
        """Reads headers only. Raises CheckpointError for tensors that are missing or not the model's."""
        self._directory = directory
        self._spec = load_spec(directory)
        self._settings = gptq_settings(directory)
        self._names = checkpoint_names(read_config(directory))
        self._places = self._locate(locate_tensors(directory))
        self._refuse_other_names()
        self._ends = self._read_ends()
        self._head: Tensor | None = None

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
    def head_bytes(self) -> int:
        return self._place(self._head_name).num_bytes

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

    def embed(self, ids: Tensor) -> Tensor:
        """Only those rows of the embeddings are read that occur."""
        place = self._place(_EMBEDDING)
        occurring, position = ids.unique(return_inverse=True)
        rows = place.file.gather(place.stored, cast("list[int]", occurring.tolist()))
        self._ends.model.embed_tokens.weight = nn.Parameter(rows.to(torch.float32), requires_grad=False)
        return self._ends.embed(position)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._ends.rotary(positions)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self._ends.final_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head stays in its stored type: a float32 copy of it would be most of a small model's memory."""
        if self._head is None:
            self._head = self._read(self._head_name)
        runs = [hidden @ rows.to(torch.float32).t() for rows in self._head.split(HEAD_RUN_ROWS)]
        logits = torch.cat(runs, dim=-1)
        return logits if self._spec.logit_scale == 1.0 else logits.mul_(self._spec.logit_scale)

    @property
    def _head_name(self) -> str:
        return _EMBEDDING if self._spec.tied_embeddings else _HEAD

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
        packed = {name.removesuffix(".qweight") + ".weight" for name in self._places if name.endswith(".qweight")}
        expected = Decoder(self._spec, device="meta").state_dict().keys() - packed
        # A tied head is sometimes stored too; the embeddings are what counts, as in transformers.
        ignored = {_HEAD} if self._spec.tied_embeddings else set[str]()
        for name, place in self._places.items():
            is_known = name in expected or name in ignored or (self._settings is not None and is_packed_tensor(name))
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
        self._fill(ends, "", [name for name in ends.state_dict() if name not in (_EMBEDDING, _HEAD)])
        for parameter in ends.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(torch.float32)
        return ends.eval().requires_grad_(False)

    def _insert_quantized(self, layer: nn.Module, prefix: str, name: str, linear: nn.Linear) -> None:
        assert self._settings is not None
        full = prefix + name
        stored = self._place(f"{full}.qweight").stored.removesuffix(".qweight")
        tensors = {
            suffix[1:]: self._places[full + suffix].file.read(stored + suffix)
            for suffix in PACKED_SUFFIXES
            if full + suffix in self._places
        }
        matrix = dict(self._names.split_matrix(stored, unpack_linear(stored, tensors, self._settings)))[full]
        found, wanted = (matrix.out_features, matrix.in_features), (linear.out_features, linear.in_features)
        if found != wanted:
            raise CheckpointError(f"{self._directory}: {full} is {found}; config.json makes it {wanted}")
        bias = None if cast("Tensor | None", linear.bias) is None else self._read(f"{full}.bias")
        parent, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(parent), attribute, QuantizedLinear(matrix, bias))

    def _fill(self, module: nn.Module, prefix: str, names: Iterable[str]) -> None:
        expected = module.state_dict()
        tensors = {name: self._read(prefix + name) for name in names}
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
                raise CheckpointError(f"{self._directory}: {prefix}{name} is {found}; config.json makes it {wanted}")
        module.load_state_dict(tensors, strict=False, assign=True)

    def _read(self, name: str) -> Tensor:
        place = self._place(name)
        if place.file.dtype(place.stored) not in _FLOATS:
            found = place.file.tensors[place.stored].dtype
            raise CheckpointError(f"{place.file.path}: {place.stored} is {found}; F32, F16 and BF16 are read")
        tensor = place.file.read(place.stored)
        return tensor if place.part is None else self._names.take_part(tensor, place.part)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise CheckpointError(f"{self._directory} lacks tensors: {self._names.stored(name).name}")
        return self._places[name]
