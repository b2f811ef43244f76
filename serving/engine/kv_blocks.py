"""Who holds which block of the KV cache, and how keys and values lie in memory.

`BlockAllocator` deals in integers and opaque keys (`prefix_keys.py`) and needs no model. `KVCache` and the attention in
`runner.py` are the only code that knows the layout, so a native kernel or another device can change it without touching
the scheduler.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quant.native.large_pages import reserve
from serving.engine.int8_rows import SCALE_DTYPE, dequantize_rows, quantize_rows
from serving.model.spec import DecoderSpec

BLOCK_SIZE = 16  # tokens; small enough to waste little on short chats, large enough to copy in one cache line run


class BlockAllocator:
    """Hands out block indices, lowest first: neighbours stay neighbours, and untouched memory stays unmapped.

    A block is free, held (by one sequence, or by several that share it) or idle: held by nobody, but its content is
    known under a key, so it is kept until its room is needed.

    Invariants: free + held + idle = total. Keys form chains, and who holds a block holds the whole chain before it
    and releases it in one call. So a block never becomes idle before those that continue it, and taking back the
    longest idle one first always takes the end of a chain.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a KV cache needs at least 1 block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._num_holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """What `allocate` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def num_holders(self, block: int) -> int:
        return self._num_holders.get(block, 0)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, forgetting the content of idle ones if it must.

        Raises ValueError when fewer are available: callers ask `num_available` first.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks asked for, {self.num_available} available")
        for _ in range(count - len(self._free)):
            self._make_free(self._idle.popitem(last=False)[0])
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for block in taken:
            self._num_holders[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more holder for blocks that `find` gave, from the first of the chain on."""
        for block in blocks:
            self._num_holders[block] = self.num_holders(block) + 1
            self._idle.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer for all blocks that it holds, in the order of the chain."""
        for block in reversed(blocks):
            num_holders = self.num_holders(block)
            if num_holders == 0:
                raise ValueError(f"block {block} is released but nobody holds it")
            if num_holders > 1:
                self._num_holders[block] = num_holders - 1
                continue
            del self._num_holders[block]
            if block in self._key_of_block:
                self._idle[block] = None
            else:
                heapq.heappush(self._free, block)

    def remember(self, block: int, key: bytes) -> bool:
        """Make a held block with its final content findable. False: another block is known under this key."""
        if self._block_of_key.setdefault(key, block) != block:
            return False
        self._key_of_block[block] = key
        return True

    def find(self, key: bytes) -> int | None:
        """The block with this content, held or idle. It is the caller's only after `share`."""
        return self._block_of_key.get(key)

    def forget_all(self) -> None:
        """No content is known any more; idle blocks are free."""
        while self._idle:
            self._make_free(self._idle.popitem()[0])
        self._block_of_key.clear()
        self._key_of_block.clear()

    def _make_free(self, block: int) -> None:
        del self._block_of_key[self._key_of_block.pop(block)]
        heapq.heappush(self._free, block)


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Size of one cache for one model. `dtype` is what is written and read; `is_int8` says that it is kept as int8."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    is_int8: bool = False

    @property
    def width(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        scale_bytes = self.num_kv_heads * SCALE_DTYPE.itemsize if self.is_int8 else 0
        return 2 * self.num_layers * BLOCK_SIZE * (self.width * self.stored_dtype.itemsize + scale_bytes)

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.int8 if self.is_int8 else self.dtype

    @classmethod
    def of(cls, spec: DecoderSpec, dtype: torch.dtype, *, is_int8: bool = False) -> KVLayout:
        return cls(spec.num_layers, spec.num_kv_heads, spec.head_dim, dtype, is_int8)


class KVCache:
    """Keys and values of every block: one tensor (layer, block, token in block, keys then values), flat in the last.

    Keys are stored after rotary. A slot is `block * BLOCK_SIZE + offset`. Memory is reserved at once and mapped by
    the system as blocks are first written.

    An int8 cache keeps codes there, and a scale for each token's head of keys and of values beside them: (layer, block,
    keys then values, kv head, token in block), so that native code loads those of a run of tokens as one vector.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self._data = _zeros((layout.num_layers, num_blocks * BLOCK_SIZE, 2 * layout.width), layout.stored_dtype)
        self._scales = (
            _zeros((layout.num_layers, num_blocks, 2, layout.num_kv_heads, BLOCK_SIZE), SCALE_DTYPE)
            if layout.is_int8
            else None
        )
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

    @property
    def scales_address(self) -> int | None:
        """As `address`, of the scales; None if there are none."""
        return None if self._scales is None else self._scales.data_ptr()

    @property
    def scales_layer_stride(self) -> int:
        return 0 if self._scales is None else self._scales.stride(0)

    def write(self, layer: int, slots: torch.Tensor, keys_values: torch.Tensor) -> None:
        """slots: (tokens,) int64; keys_values: (tokens, 2 * width), keys first."""
        if self._scales is None:
            self._data[layer].index_copy_(0, slots, keys_values)
            return
        codes, scales = quantize_rows(keys_values.unflatten(1, (2, self.layout.num_kv_heads, self.layout.head_dim)))
        self._data[layer].index_copy_(0, slots, codes.flatten(1))
        self._scales[layer][slots // BLOCK_SIZE, :, :, slots % BLOCK_SIZE] = scales

    def read_run(self, layer: int, first_slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of consecutive slots, each (kv heads, count, head dim); views, or copies of an int8 cache.

        first_slot: the first of a block.
        """
        if self._scales is not None:
            first_block = first_slot // BLOCK_SIZE
            table = torch.arange(first_block, first_block + blocks_for(count)).view(1, -1)
            keys, values = self.read_blocks(layer, table)
            return keys[0, :, :count], values[0, :, :count]
        last_slot = first_slot + count
        return self._keys[layer][:, first_slot:last_slot], self._values[layer][:, first_slot:last_slot]

    def read_blocks(self, layer: int, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole blocks, copied. block_table: (rows, blocks) int64.

        Returns two tensors (rows, kv heads, blocks * BLOCK_SIZE, head dim).
        """
        num_rows, num_blocks = block_table.shape
        blocks = self._data[layer].view(self.num_blocks, -1).index_select(0, block_table.view(-1))
        tokens = blocks.view(num_rows, num_blocks * BLOCK_SIZE, 2, self.layout.num_kv_heads, self.layout.head_dim)
        if self._scales is not None:
            scales = self._scales[layer].index_select(0, block_table.view(-1)).movedim(3, 1)
            tokens = dequantize_rows(tokens, scales.reshape(tokens.shape[:-1]), self.layout.dtype)
        return tokens[:, :, 0].transpose(1, 2), tokens[:, :, 1].transpose(1, 2)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # Attention over padded blocks reads slots that nobody has written and multiplies them by 0, which a NaN survives.
    # Mapped on first use; torch's would be touched now.
    return torch.from_numpy(reserve(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)
