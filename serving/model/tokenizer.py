"""Text to token ids and back, over the `tokenizers` library and a model directory's own files.

Text never becomes a special token: what looks like one is encoded character by character. Special tokens come only from
`serving.model.chat_format` and, where the tokenizer adds one, as the beginning of a plain prompt.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer

from quant.errors import CheckpointError
from serving.model.json_files import parse_object, read_optional_object
from serving.model.token_table import build_token_bytes, components, strips_leading_space

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
CONFIG_FILE = "config.json"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in text before anything else. `lstrip` and `rstrip` swallow white space around it."""

    token_id: int
    text: str
    is_special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class TextEncoder:
    """Encodes plain text: neither special tokens nor the added ones named at construction ever come out.

    at_start says that the text begins the whole input: some tokenizers put a space before the first word there only.
    """

    def __init__(self, source: str, definition: Mapping[str, object], as_text: Collection[AddedToken]) -> None:
        """source: tokenizer.json as text, definition: the same parsed."""
        self.at_start = _build_library_tokenizer(source, as_text)
        continued = _without_first_word_space(definition)
        self._continued = self.at_start if continued is None else _build_library_tokenizer(continued, as_text)
        unknown = cast("Mapping[str, object]", definition.get("model") or {}).get("unk_token")
        # An unknown character is a legitimate piece of plain text.
        special = {token.token_id for token in added_tokens(definition) if token.is_special and token.text != unknown}
        self._forbidden = special | {token.token_id for token in as_text}

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        encoder = self.at_start if at_start else self._continued
        text = _replace_lone_surrogates(text)
        ids = encoder.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # Merges can spell a special token out of ordinary pieces; single characters cannot.
        return [
            token_id
            for character in text
            for token_id in encoder.encode(character, add_special_tokens=False).ids
            if token_id not in self._forbidden
        ]


class ModelTokenizer:
    """The tokenizer of a model directory.

    token_bytes: exact bytes by id, empty for special tokens; as long as the model's vocabulary, which may be padded.
    eos_ids:     every id that ends a generation. special_ids: ids of special tokens.
    named_special_tokens: `bos_token`, `eos_token`, ... as the chat template sees them.
    strips_leading_space: `decode` drops one space at the beginning, as sentencepiece does; joined bytes keep it.
    """

    def __init__(
        self,
        source: str,
        *,
        named_special_tokens: Mapping[str, str],
        eos_ids: Collection[int] = (),
        min_vocab_size: int = 0,
    ) -> None:
        """source: tokenizer.json as text. Kept as text: parsed it would be ten times larger."""
        definition = parse_object(source, TOKENIZER_FILE)
        self._source = source
        self._text_encoder = TextEncoder(source, definition, ())
        self._tokenizer = self._text_encoder.at_start
        self._prompt_prefix, self._prompt_suffix = _prompt_frame(self._tokenizer)
        self.added_tokens = tuple(added_tokens(definition))
        self.special_ids = frozenset(token.token_id for token in self.added_tokens if token.is_special)
        self.named_special_tokens = dict(named_special_tokens)
        self.bos_id = self._id_of_named("bos_token")
        eos_id = self._id_of_named("eos_token")
        self.eos_ids = frozenset(eos_ids) | (frozenset() if eos_id is None else {eos_id})
        self.token_bytes: Sequence[bytes] = build_token_bytes(
            definition,
            self._tokenizer.get_vocab(with_added_tokens=True),
            {token.token_id: token.text for token in self.added_tokens},
            self.special_ids,
            size=min_vocab_size,
        )
        self.vocab_size = len(self.token_bytes)
        self.strips_leading_space = strips_leading_space(definition)

    @classmethod
    def load(cls, directory: Path) -> ModelTokenizer:
        """Raises CheckpointError if tokenizer.json is missing, unreadable or of a kind that is not supported."""
        if not (directory / TOKENIZER_FILE).exists():
            raise CheckpointError(
                f"{directory} has no {TOKENIZER_FILE}; other tokenizer files are not read: "
                "save the tokenizer again with transformers, which writes one"
            )
        config = read_optional_object(directory / CONFIG_FILE)
        vocab_size = config.get("vocab_size")
        return cls(
            (directory / TOKENIZER_FILE).read_text(encoding="utf-8"),
            named_special_tokens=_named_special_tokens(read_optional_object(directory / TOKENIZER_CONFIG_FILE)),
            eos_ids=_eos_ids(read_optional_object(directory / GENERATION_CONFIG_FILE), config),
            min_vocab_size=vocab_size if isinstance(vocab_size, int) else 0,
        )

    def text_encoder(self, as_text: Collection[AddedToken] = ()) -> TextEncoder:
        """An encoder for which, beside the special tokens, `as_text` are ordinary characters too."""
        if not as_text:
            return self._text_encoder
        return TextEncoder(self._source, parse_object(self._source, TOKENIZER_FILE), as_text)

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text are plain text; nothing is put before or after it."""
        return self._text_encoder.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """`encode`, between what the tokenizer's own post-processor adds: for most, a beginning-of-sequence token."""
        return [*self._prompt_prefix, *self.encode(text), *self._prompt_suffix]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of whole sequences; incomplete characters become U+FFFD, ids without a token nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """How to show one token: special ones by name, parts of characters as U+FFFD, ids without a token as ""."""
        if token_id in self.special_ids:
            return self._tokenizer.id_to_token(token_id) or ""
        return self.token_bytes[token_id].decode(errors="replace")

    def _id_of_named(self, name: str) -> int | None:
        text = self.named_special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)


def added_tokens(definition: Mapping[str, object]) -> list[AddedToken]:
    tokens = cast("list[Mapping[str, object]]", definition.get("added_tokens") or [])
    return [
        AddedToken(
            token_id=cast("int", token["id"]),
            text=str(token["content"]),
            is_special=bool(token.get("special")),
            lstrip=bool(token.get("lstrip")),
            rstrip=bool(token.get("rstrip")),
            single_word=bool(token.get("single_word")),
        )
        for token in tokens
    ]


def _build_library_tokenizer(source: str, as_text: Collection[AddedToken]) -> Tokenizer:
    """A tokenizer for which special tokens, and `as_text` made special here, are not recognised in text."""
    try:
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # The library raises bare Exception for a definition that it cannot read.
        raise CheckpointError(f"{TOKENIZER_FILE} cannot be used: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([LibraryToken(token.text, special=True, normalized=False) for token in as_text])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _prompt_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a single text."""
    framed = tokenizer.encode("a", add_special_tokens=True)
    inner = [index for index, is_added in enumerate(framed.special_tokens_mask) if not is_added]
    return framed.ids[: inner[0]], framed.ids[inner[-1] + 1 :]


def _without_first_word_space(definition: Mapping[str, object]) -> str | None:
    """tokenizer.json for text in the middle of an input, or None if it is the same there."""
    parts = components(definition.get("pre_tokenizer"))
    if not any(part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first" for part in parts):
        return None
    copied = cast("dict[str, object]", json.loads(json.dumps(definition)))
    for part in components(copied["pre_tokenizer"]):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            cast("dict[str, object]", part)["prepend_scheme"] = "never"
    return json.dumps(copied)


def _replace_lone_surrogates(text: str) -> str:
    """JSON can carry halves of surrogate pairs, which no UTF-8 text can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _named_special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and so on, stored as a string or as an object with `content`; null ones are absent."""
    extra = config.get("extra_special_tokens")
    named: dict[str, object] = dict(cast("dict[str, object]", extra)) if isinstance(extra, dict) else {}
    named |= {name: config.get(name) for name in _NAMED_TOKENS}
    texts: dict[str, str] = {}
    for name, value in named.items():
        content = cast("dict[str, object]", value).get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            texts[name] = content
    return texts


def _eos_ids(generation_config: Mapping[str, object], config: Mapping[str, object]) -> list[int]:
    """generation_config.json's end ids, one or a list; config.json's where there are none, as in transformers."""
    value = generation_config.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    values = cast("list[object]", value) if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int)]
