"""Log-probabilities in OpenAI's two shapes, held back until the text they belong to is out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from serving.engine.requests import TokenLogprob
from serving.gateway.fields import JsonObject, JsonValue
from serving.gateway.ports import TokenizerPort

# JSON has no infinity; OpenAI's own value for "practically impossible".
_LOWEST = -9999.0


class LogprobAligner:
    """Releases a token's entry with the text chunk that completes it, so joined entries spell the joined text.

    A token of half a character waits for the other half. What a stop string swallowed and the end-of-turn token are
    dropped: they are not in the text.
    """

    def __init__(self, tokenizer: TokenizerPort) -> None:
        self._tokenizer = tokenizer
        self._waiting: deque[TokenLogprob] = deque()
        self._num_token_bytes = 0  # of released tokens
        self._num_text_bytes = 0

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        self._waiting.extend(entries)

    def release(self, text: str, *, is_last: bool, is_cut: bool) -> list[TokenLogprob]:
        """`is_cut`: the text ends where the model was stopped, so tokens after its end are not part of it."""
        self._num_text_bytes += len(text.encode())
        released: list[TokenLogprob] = []
        while self._waiting:
            num_bytes = len(self._tokenizer.token_bytes[self._waiting[0].token_id])
            is_complete = self._num_token_bytes + num_bytes <= self._num_text_bytes
            is_begun = self._num_token_bytes < self._num_text_bytes
            if not (is_complete or (is_last and (is_begun or not is_cut))):
                break
            self._num_token_bytes += num_bytes
            entry = self._waiting.popleft()
            if entry.token_id not in self._tokenizer.eos_ids:
                released.append(entry)
        return released


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
