"""Under which keys the prefix cache knows blocks: a chain of hashes over token ids.

A block's key covers everything its keys and values depend on: the ids in it, all ids before it, the weights and the
adapter. And it covers a salt: how fast an answer starts tells whether its prompt was known, so whoever must not learn
what another sent gets another salt.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from serving.engine.adapters import Adapter

# Of cryptographic strength: no prompt can be made to look like another one.
_KEY_BYTES = 16


def root_key(model_version: int, adapter: Adapter | None, salt: str) -> bytes:
    """What the first block's key continues. `model_version` counts the weights that an engine has run."""
    named = None if adapter is None else (adapter.name, adapter.version)
    return blake2b(msgspec.msgpack.encode((model_version, named, salt)), digest_size=_KEY_BYTES).digest()


def block_key(parent: bytes, ids: Sequence[int]) -> bytes:
    """The key of a full block from that of the block before it, or from the root."""
    return blake2b(parent + array("q", ids).tobytes(), digest_size=_KEY_BYTES).digest()
