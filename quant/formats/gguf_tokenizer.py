"""Byte-level BPE tokenizers between tokenizer.json and GGUF's metadata, both ways.

GGUF names the pre-tokenizer (how text is cut before merging) and does not contain it, so those known here are the ones
that can be read and written; any other is refused by name, never guessed: a text cut otherwise costs quality silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

from quant.errors import CheckpointError
from quant.formats.gguf_metadata import GgufMetadata
from quant.formats.gguf_writer import Value

Json: TypeAlias = "dict[str, object]"

# Token types of GGUF: 1 normal, 3 control, 4 user-defined, 5 unused; 2 (unknown) and 6 (byte) belong to sentencepiece.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_PLAIN_TYPES: Final = frozenset({_NORMAL, _UNUSED})
# GGUF's name of a token's role, and tokenizer_config.json's.
_ROLES: Final = (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))
_BYTE_LEVEL: Final[Json] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES_ONLY: Final[Json] = {**_BYTE_LEVEL, "use_regex": False}


def _split(pattern: str) -> Json:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            _BYTES_ONLY,
        ],
    }


def _word_pattern(digits: str) -> str:
    """Contractions, words, runs of digits, punctuation, line ends, spaces: Llama 3's pattern, and Qwen 2's."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`names` in GGUF, the first for writing. `ignores_merges`: a word that is a token is taken whole, as it stands.

    adds_bos: what a file means that does not say whether texts begin with the BOS token
    """

    names: tuple[str, ...]
    definition: Json
    normalizer: Json | None = None
    ignores_merges: bool = False
    adds_bos: bool = False


PRE_TOKENIZERS: Final = (
    PreTokenizer(
        ("smollm",),
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    ),
    PreTokenizer(("gpt-2",), _BYTE_LEVEL),
    PreTokenizer(("qwen2", "deepseek-r1-qwen"), _split(_word_pattern(r"\p{N}")), normalizer={"type": "NFC"}),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3"),
        _split(_word_pattern(r"\p{N}{1,3}")),
        ignores_merges=True,
        adds_bos=True,
    ),
)


def read_tokenizer(metadata: GgufMetadata) -> Json:
    """tokenizer.json's content. CheckpointError for a tokenizer that GGUF describes only in part and we do not know."""
    pre_tokenizer = _known_pre_tokenizer(metadata)
    tokens = metadata.strings("tokenizer.ggml.tokens")
    merges = [merge.split(" ") for merge in metadata.strings("tokenizer.ggml.merges")]
    known = set(tokens)
    for index, pair in enumerate(merges):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
            raise CheckpointError(
                f"{metadata.path}: merge {index} is {' '.join(pair)!r:.60}, expected two of its tokens"
            )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": pre_tokenizer.normalizer,
        "pre_tokenizer": pre_tokenizer.definition,
        "post_processor": _read_post_processor(metadata, pre_tokenizer, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre_tokenizer.ignores_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def read_tokenizer_config(metadata: GgufMetadata, max_tokens: int) -> Json:
    """tokenizer_config.json's content."""
    tokens = metadata.strings("tokenizer.ggml.tokens")
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for key, role in _ROLES:
        index = metadata.get_or(f"tokenizer.ggml.{key}_token_id", int, -1)
        if 0 <= index < len(tokens):
            config[f"{role}_token"] = tokens[index]
    return config


def read_special_ids(metadata: GgufMetadata) -> Json:
    """The ids of generation_config.json; a second token that ends a turn joins the first in a list."""
    ids: Json = {}
    if "tokenizer.ggml.bos_token_id" in metadata.values:
        ids["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id", int)
    ids["eos_token_id"] = metadata.get("tokenizer.ggml.eos_token_id", int)
    end_of_turn = metadata.get_or("tokenizer.ggml.eot_token_id", int, -1)
    if end_of_turn not in (-1, ids["eos_token_id"]):
        ids["eos_token_id"] = [ids["eos_token_id"], end_of_turn]
    if "tokenizer.ggml.padding_token_id" in metadata.values:
        ids["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id", int)
    return ids


def _known_pre_tokenizer(metadata: GgufMetadata) -> PreTokenizer:
    model = metadata.get("tokenizer.ggml.model", str)
    name = metadata.get_or("tokenizer.ggml.pre", str, "default")
    for known in PRE_TOKENIZERS:
        if model == "gpt2" and name in known.names:
            return known
    names = ", ".join(repr(name) for known in PRE_TOKENIZERS for name in known.names)
    raise CheckpointError(
        f"{metadata.path} has the tokenizer {model!r} with pre-tokenizer {name!r}; known are 'gpt2' with "
        f"{names}: use the model's safetensors directory, which contains its tokenizer"
    )


def _read_post_processor(metadata: GgufMetadata, known: PreTokenizer, tokens: Sequence[str]) -> Json | None:
    if metadata.get_or("tokenizer.ggml.add_eos_token", bool, False):
        raise CheckpointError(f"{metadata.path} ends every text with an EOS token, which is not supported for GGUF")
    if not metadata.get_or("tokenizer.ggml.add_bos_token", bool, known.adds_bos):
        return None
    bos_id = metadata.get("tokenizer.ggml.bos_token_id", int)
    if not 0 <= bos_id < len(tokens):
        raise CheckpointError(f"{metadata.path}: its BOS token is {bos_id}, of {len(tokens):,} tokens")
    bos, text = {"SpecialToken": {"id": tokens[bos_id], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {tokens[bos_id]: {"id": tokens[bos_id], "ids": [bos_id], "tokens": [tokens[bos_id]]}},
    }


def _added_tokens(metadata: GgufMetadata, tokens: Sequence[str]) -> list[Json]:
    types = metadata.get("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{metadata.path} has {len(tokens):,} tokens, {len(set(tokens)):,} of them different, "
            f"and {len(types):,} token types; expected equal numbers"
        )
    unknown = {kind for kind in types if not isinstance(kind, list)} - _PLAIN_TYPES - {_CONTROL, _USER_DEFINED}
    if unknown or any(isinstance(kind, list) for kind in types):
        found = sorted(str(kind) for kind in unknown) or "lists"
        raise CheckpointError(f"{metadata.path} has tokens of types {found}, which byte-level BPE lacks")
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, kind in enumerate(types)
        if kind not in _PLAIN_TYPES
    ]


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Token ids by role. `eos`: every id that ends a generation, the most usual first."""

    bos: int | None
    eos: tuple[int, ...]
    unknown: int | None = None
    padding: int | None = None


def tokenizer_metadata(
    definition: Mapping[str, object], special: SpecialIds, vocab_size: int, origin: str
) -> dict[str, Value]:
    """GGUF's metadata for tokenizer.json's content `definition`; `vocab_size` is the number of embeddings.

    Raises CheckpointError, naming `origin`, for a tokenizer that GGUF cannot describe or llama.cpp would use otherwise.
    """
    model = cast("Mapping[str, object]", definition.get("model") or {})
    pre_tokenizer = _matching_pre_tokenizer(definition, model, origin)
    tokens, types = _token_list(definition, model, vocab_size, origin)
    merges = cast("list[str | list[str]]", model["merges"])
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer.names[0],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": _adds_bos(definition, origin),
    }
    eos = (*special.eos, None, None)
    ids = {"bos": special.bos, "eos": eos[0], "eot": eos[1], "unknown": special.unknown, "padding": special.padding}
    metadata.update({f"tokenizer.ggml.{role}_token_id": index for role, index in ids.items() if index is not None})
    return metadata


def _matching_pre_tokenizer(definition: Mapping[str, object], model: Mapping[str, object], origin: str) -> PreTokenizer:
    if model.get("type") != "BPE" or model.get("byte_fallback") is True:
        kind = "sentencepiece's BPE" if model.get("type") == "BPE" else f"of the kind {model.get('type')!r}"
        raise CheckpointError(f"{origin}: its tokenizer is {kind}; GGUF is written for byte-level BPE only")
    found, normalizer = _canonical(definition.get("pre_tokenizer")), definition.get("normalizer")
    for known in PRE_TOKENIZERS:
        if found != _canonical(known.definition) or bool(model.get("ignore_merges")) != known.ignores_merges:
            continue
        if normalizer is None or normalizer == known.normalizer:
            return known
    names = ", ".join(known.names[0] for known in PRE_TOKENIZERS)
    raise CheckpointError(
        f"{origin}: its tokenizer cuts text in a way that has no name here (known: {names}), and GGUF holds only the "
        "name: convert the source model with llama.cpp's convert_hf_to_gguf.py, which knows more of them"
    )


def _canonical(part: object) -> object:
    """A pre-tokenizer without what does not change how text is cut, to compare two."""
    if not isinstance(part, Mapping):
        return part
    fields = dict(cast("Mapping[str, object]", part))
    if fields.get("type") == "ByteLevel":
        return ("ByteLevel", fields.get("add_prefix_space", True), fields.get("use_regex", True))
    if fields.get("type") == "Sequence":
        inner = [_canonical(item) for item in cast("list[object]", fields.get("pretokenizers") or [])]
        return inner[0] if len(inner) == 1 else inner
    return fields


def _token_list(
    definition: Mapping[str, object], model: Mapping[str, object], vocab_size: int, origin: str
) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids without a token, as padded vocabularies have, are unused ones with a name."""
    texts = {index: text for text, index in cast("Mapping[str, int]", model["vocab"]).items()}
    types = dict.fromkeys(texts, _NORMAL)
    for token in cast("list[Mapping[str, object]]", definition.get("added_tokens") or []):
        index = cast("int", token["id"])
        texts[index] = str(token["content"])
        types[index] = _CONTROL if token.get("special") else _USER_DEFINED
    if max(texts) >= vocab_size:
        raise CheckpointError(f"{origin}: its tokenizer has token {max(texts):,}, its embeddings {vocab_size:,} rows")
    every = range(vocab_size)
    return [texts.get(index, f"[PAD{index}]") for index in every], [types.get(index, _UNUSED) for index in every]


def _adds_bos(definition: Mapping[str, object], origin: str) -> bool:
    """Whether the post-processor puts a special token before a text."""
    for part in _processors(definition.get("post_processor")):
        if part.get("type") == "ByteLevel":  # changes offsets only
            continue
        template = cast("list[Mapping[str, object]]", part.get("single") or [])
        kinds = [next(iter(piece)) for piece in template]
        if part.get("type") != "TemplateProcessing" or kinds not in (["Sequence"], ["SpecialToken", "Sequence"]):
            raise CheckpointError(f"{origin}: its tokenizer frames texts in a way that GGUF cannot describe")
        if kinds[0] == "SpecialToken":
            return True
    return False


def _processors(part: object) -> list[Mapping[str, object]]:
    if not isinstance(part, Mapping):
        return []
    fields = cast("Mapping[str, object]", part)
    if fields.get("type") == "Sequence":
        return [inner for item in cast("list[object]", fields.get("processors") or []) for inner in _processors(item)]
    return [fields]
