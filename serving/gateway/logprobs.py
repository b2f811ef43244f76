"""Log-probabilities in OpenAI's two shapes, held back until the text they belong to is out."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence

from serving.engine.requests import TokenLogprob
from serving.gateway.fields import JsonObject, JsonValue
from serving.gateway.ports import TokenizerPort

# JSON has no infinity; OpenAI's own value for "practically impossible".
_LOWEST = -9999.0


class LogprobAligner:
    """Releases a token's entry with the text chunk that completes it, so joined entries spell the joined text.

    A token of half a character waits for the other half. What is not wholly in the text is dropped: the end-of-turn
    token, and tokens that a stop string or moderation cut off or cut through; their bytes would tell what was withheld.
    """

    def __init__(self, tokenizer: TokenizerPort) -> None:
        self._tokenizer = tokenizer
        # Decodes as the detokenizer does. Counting bytes would be wrong: a byte that is no UTF-8 becomes U+FFFD.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._beginning = ""  # of what the tokens decode to, until the text has begun
        self._num_decoded_chars = 0
        self._num_text_chars = 0
        self._waiting: deque[tuple[TokenLogprob, int]] = deque()  # with the characters of text that complete each

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        for entry in entries:
            decoded = self._decoder.decode(self._tokenizer.token_bytes[entry.token_id])
            self._num_decoded_chars += len(decoded)
            if self._num_text_chars == 0:
                self._beginning += decoded
            has_half_a_character = bool(self._decoder.getstate()[0])
            self._waiting.append((entry, self._num_decoded_chars + has_half_a_character))

    def release(self, text: str) -> list[TokenLogprob]:
        """`text` is what leaves now; call it also when nothing does."""
        if text and self._num_text_chars == 0 and self._is_space_stripped(text):
            self._num_text_chars = 1
        self._num_text_chars += len(text)
        released: list[TokenLogprob] = []
        while self._waiting and self._waiting[0][1] <= self._num_text_chars:
            entry, _ = self._waiting.popleft()
            if entry.token_id not in self._tokenizer.eos_ids:
                released.append(entry)
        return released

    def _is_space_stripped(self, text: str) -> bool:
        """Sentencepiece's decoders drop the space before the first word."""
        return not self._beginning.startswith(text) and self._beginning.startswith(" " + text)


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: TokenizerPort) -> JsonObject:
    return {"content": [_chat_entry(entry, tokenizer) for entry in entries], "refusal": None}


def _chat_entry(entry: TokenLogprob, tokenizer: TokenizerPort) -> JsonValue:
    top: list[JsonValue] = [_shown(token_id, logprob, tokenizer) for token_id, logprob in entry.top]
    return {**_shown(entry.token_id, entry.logprob, tokenizer), "top_logprobs": top}


def _shown(token_id: int, logprob: float, tokenizer: TokenizerPort) -> JsonObject:
    token_bytes = tokenizer.token_bytes[token_id]
    return {
        "token": shown_token(token_id, tokenizer),
        "logprob": max(logprob, _LOWEST),
        "bytes": list(token_bytes) if token_bytes else None,
    }


def shown_token(token_id: int, tokenizer: TokenizerPort) -> str:
    token_bytes = tokenizer.token_bytes[token_id]
    return token_bytes.decode("utf-8", "replace") if token_bytes else tokenizer.token_text(token_id)


def completion_logprobs(
    entries: Sequence[TokenLogprob | None], tokens: Sequence[str], tokenizer: TokenizerPort, text_offset: int
) -> JsonObject:
    """The shape of /v1/completions. An entry of None is a first prompt token, which nothing precedes."""
    offsets: list[JsonValue] = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    return {
        "tokens": list(tokens),
        "token_logprobs": [None if entry is None else max(entry.logprob, _LOWEST) for entry in entries],
        "top_logprobs": [None if entry is None else _top_map(entry, tokenizer) for entry in entries],
        "text_offset": offsets,
    }


def _top_map(entry: TokenLogprob, tokenizer: TokenizerPort) -> JsonObject:
    return {shown_token(token_id, tokenizer): max(logprob, _LOWEST) for token_id, logprob in entry.top}
