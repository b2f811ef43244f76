"""The exact bytes of every token, worked out from tokenizer.json: what lets text be streamed without half characters.

Two ways of writing bytes in a vocabulary are known: byte-level BPE's, where each character of a token stands for one
byte, and sentencepiece's, where U+2581 stands for a space and <0xNN> for a byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import cast

from quant.errors import CheckpointError

_WORD_START = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def build_token_bytes(
    definition: Mapping[str, object],
    vocabulary: Mapping[str, int],
    added: Mapping[int, str],
    special_ids: frozenset[int],
    *,
    size: int,
) -> list[bytes]:
    """Bytes by token id: none for special tokens and for ids without a token.

    definition: tokenizer.json; added: text of added tokens by id; size: length wanted, at least the vocabulary's.
    Raises CheckpointError if the decoder is of neither known kind.
    """
    kinds = {str(part.get("type")) for part in components(definition.get("decoder"))}
    if "ByteLevel" in kinds:
        bytes_of = _byte_level_bytes
    elif kinds & {"ByteFallback", "Metaspace"}:
        bytes_of = _sentencepiece_bytes
    else:
        raise CheckpointError(
            f"tokenizer.json: decoder {', '.join(sorted(kinds)) or 'none'} is not supported; "
            "ByteLevel, ByteFallback and Metaspace are"
        )
    table = [b""] * max(size, max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id not in special_ids:
            table[token_id] = added[token_id].encode() if token_id in added else bytes_of(token)
    return table


def strips_leading_space(definition: Mapping[str, object]) -> bool:
    """Whether decoding drops the space that sentencepiece puts before the first word of a text."""
    for part in components(definition.get("decoder")):
        if part.get("type") == "Strip" and part.get("content") == " " and part.get("start"):
            return True
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never":
            return True
    return False


def components(part: object) -> Iterator[Mapping[str, object]]:
    """A part of tokenizer.json (decoder, pre_tokenizer, normalizer), with sequences taken apart."""
    if not isinstance(part, Mapping):
        return
    fields = cast("Mapping[str, object]", part)
    if fields.get("type") != "Sequence":
        yield fields
    for key in ("decoders", "pretokenizers", "normalizers"):
        inner = fields.get(key)
        if isinstance(inner, list):
            for item in cast("list[object]", inner):
                yield from components(item)


def _byte_of_character() -> dict[int, int]:
    """GPT-2's map: printable Latin-1 stands for itself, the other bytes for 256, 257, ... in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + index: byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[ord(character)] for character in token])
    except KeyError:
        # The decoder takes a token with a foreign character as it stands.
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_WORD_START, " ").encode()
