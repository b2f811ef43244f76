"""Who owns which block of the KV cache, and how keys and values lie in memory.

`BlockAllocator` deals in integers only and needs no model. `KVCache` and the attention in `runner.py` are the only
code that knows the layout, so a native kernel or another device can change it without touching the scheduler.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from serving.model.spec import DecoderSpec

BLOCK_SIZE = 16  # tokens; small enough to waste little on short chats, large enough to copy in one cache line run


class BlockAllocator:
    """Hands out block indices, lowest first: neighbours stay neighbours, and untouched memory stays unmapped.

    Invariant: every block is free or has exactly one owner; free + used = total.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a KV cache needs at least 1 block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks. Raises ValueError when fewer are free: callers ask `num_free` first."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        taken = [heapq.heappop(self._free) for _ in range(count)]
        self._used.update(taken)
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block not in self._used:
                raise ValueError(f"block {block} is freed but has no owner")
            self._used.remove(block)
            heapq.heappush(self._free, block)


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Size of one cache for one model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        return 2 * self.num_layers * BLOCK_SIZE * self.width * self.dtype.itemsize

    @classmethod
    def of(cls, spec: DecoderSpec, dtype: torch.dtype) -> KVLayout:
        return cls(spec.num_layers, spec.num_kv_heads, spec.head_dim, dtype)


class KVCache:
    """Keys and values of every block: one tensor (layer, block, token in block, keys then values), flat in the last.

    Keys are stored after rotary. A slot is `block * BLOCK_SIZE + offset`. Memory is reserved at once and mapped by
    the system as blocks are first written.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (layout.num_layers, num_blocks * BLOCK_SIZE, 2 * layout.width)
        # Attention over padded blocks reads slots that nobody has written and multiplies them by 0, which a NaN
        # survives. numpy's zeros are mapped on first use; torch's would be touched now.
        zeros = np.zeros(math.prod(shape) * layout.dtype.itemsize, dtype=np.uint8)
        self._data = torch.from_numpy(zeros).view(layout.dtype).view(shape)
        # Views by layer, made once: (kv heads, slots, head dim).
        heads = self._data.unflatten(2, (2, layout.num_kv_heads, layout.head_dim)).permute(0, 2, 3, 1, 4)
        self._keys = [heads[layer, 0] for layer in range(layout.num_layers)]
        self._values = [heads[layer, 1] for layer in range(layout.num_layers)]

    @property
    def address(self) -> int:
        """Of the first layer's first slot, for native code; valid as long as this object."""
        return self._data.data_ptr()

    @property
    def layer_stride(self) -> int:
        """Elements from one layer to the next."""
        return self._data.stride(0)

    def write(self, layer: int, slots: torch.Tensor, keys_values: torch.Tensor) -> None:
        """slots: (tokens,) int64; keys_values: (tokens, 2 * width), keys first."""
        self._data[layer].index_copy_(0, slots, keys_values)

    def read_run(self, layer: int, first_slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of consecutive slots as views, each (kv heads, count, head dim)."""
        last_slot = first_slot + count
        return self._keys[layer][:, first_slot:last_slot], self._values[layer][:, first_slot:last_slot]

    def read_blocks(self, layer: int, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole blocks, copied. block_table: (rows, blocks) int64.

        Returns two tensors (rows, kv heads, blocks * BLOCK_SIZE, head dim).
        """
        num_rows, num_blocks = block_table.shape
        blocks = self._data[layer].view(self.num_blocks, -1).index_select(0, block_table.view(-1))
        tokens = blocks.view(num_rows, num_blocks * BLOCK_SIZE, 2, self.layout.num_kv_heads, self.layout.head_dim)
        return tokens[:, :, 0].transpose(1, 2), tokens[:, :, 1].transpose(1, 2)
