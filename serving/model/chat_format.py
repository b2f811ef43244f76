"""Messages to token ids through the checkpoint's chat template: one renderer for serving and for training.

What users write can never become a control token. Before rendering, every character in a content with which a control
token could begin is replaced by a private-use one; the control tokens found afterwards are the template's own. The text
between them is restored and encoded as plain text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Literal

import jinja2

from quant.errors import CheckpointError
from serving.model.chat_template import compile_template, find_template, string_constants
from serving.model.tokenizer import AddedToken, ModelTokenizer

Role = Literal["system", "user", "assistant", "tool"]
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# How much of a content's end is compared with what stands before the end-of-turn token.
_TAIL_CHARS = 16


class ChatFormatError(ValueError):
    """These messages cannot be written in the model's chat format; the message says why, for whoever sent them."""


class NoChatTemplateError(CheckpointError):
    """A base model: it completes text and has no chat format."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    content: str


class ChatFormat:
    """A checkpoint's chat format. `sha256` identifies the template that a model was trained with."""

    def __init__(self, template: str, tokenizer: ModelTokenizer, *, now: Callable[[], datetime] = datetime.now) -> None:
        self.sha256 = hashlib.sha256(template.encode()).hexdigest()
        self._tokenizer = tokenizer
        self._template = compile_template(template, now=now)
        self._template_characters = frozenset(template)
        control = _control_tokens(tokenizer.added_tokens, template)
        self._encoder = tokenizer.text_encoder([token for token in control if not token.is_special])
        self._control_ids = {token.text: token.token_id for token in control}
        self._control_pattern = _control_pattern(control)
        self._first_characters = "".join(sorted({token.text[0] for token in control}))
        self._assistant_markup = _assistant_markup(control, string_constants(template))

    @classmethod
    def load(cls, directory: Path, tokenizer: ModelTokenizer) -> ChatFormat:
        """Raises NoChatTemplateError for a base model, CheckpointError for a template that cannot be used."""
        template = find_template(directory)
        if template is None:
            raise NoChatTemplateError(f"{directory} has no chat template; it can complete text and not chat")
        return cls(template, tokenizer)

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of the conversation and, if asked, of what precedes the next answer. Raises ChatFormatError."""
        originals = self._private_characters([message.content for message in messages])
        placeholders = {original: private for private, original in originals.items()}
        hidden = [{"role": message.role, "content": self._hide(message, placeholders)} for message in messages]
        text = self._render_template(hidden, add_generation_prompt)
        return self._encode(text, str.maketrans(originals))

    def render_with_loss_mask(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and True on each answer and its end-of-turn token: on what a model would write.

        Raises ChatFormatError unless each answer follows exactly the ids that would have been its prompt.
        """
        ids = self.render(messages, add_generation_prompt=False)
        is_answer = [False] * len(ids)
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            if ids[: len(prompt)] != prompt:
                raise ChatFormatError(
                    f"message {index}: the conversation's ids do not begin with those of this answer's prompt; "
                    "the chat template rewrites earlier messages, or the answer begins with white space"
                )
            end = self._end_of_answer(ids, len(prompt), index, message.content)
            is_answer[len(prompt) : end] = [True] * (end - len(prompt))
        return ids, is_answer

    def _end_of_answer(self, ids: list[int], start: int, index: int, content: str) -> int:
        """Position after the end-of-turn token, which must follow the end of the content."""
        for position in range(start, len(ids)):
            if ids[position] in self._tokenizer.eos_ids:
                written = self._tokenizer.decode(ids[start:position], skip_special=False)
                if written.rstrip().endswith(content.rstrip()[-_TAIL_CHARS:]):
                    return position + 1
                break
        raise ChatFormatError(f"message {index}: the chat template does not end this answer with an end-of-turn token")

    def _private_characters(self, contents: Sequence[str]) -> dict[str, str]:
        """For each character with which control tokens begin, a private-use one that occurs nowhere: {private: it}."""
        used = self._template_characters.union(*contents)
        free = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in used)
        originals = dict(zip(free, self._first_characters, strict=False))
        if len(originals) < len(self._first_characters):
            raise ChatFormatError("the messages use every private-use character of Unicode")
        return originals

    def _hide(self, message: ChatMessage, placeholders: dict[str, str]) -> str:
        if message.role == "assistant" and self._assistant_markup is not None:
            return self._assistant_markup.sub(
                lambda found: placeholders.get(found.group(), found.group()), message.content
            )
        return message.content.translate(str.maketrans(placeholders))

    def _render_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.named_special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ChatFormatError(f"the model's chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise ChatFormatError(f"the model's chat template fails on these messages: {error}") from error

    def _encode(self, text: str, restore: dict[int, str]) -> list[int]:
        """Control tokens in `text` are the template's; what lies between two of them is encoded as one piece."""
        ids: list[int] = []
        for start, span, control_id in self._split(text):
            if span:
                ids += self._encoder.encode(span.translate(restore), at_start=start == 0)
            if control_id is not None:
                ids.append(control_id)
        return ids

    def _split(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """(start, plain text, the control token that follows it) until the end of `text`."""
        start = 0
        for found in self._control_pattern.finditer(text):
            yield start, text[start : found.start()], self._control_ids[found[found.lastindex or 0]]
            start = found.end()
        yield start, text[start:], None


def _control_tokens(added: Sequence[AddedToken], template: str) -> list[AddedToken]:
    """Special tokens, and other added ones that the template writes or looks for (`<think>`)."""
    return [token for token in added if token.is_special or (token.text in template and not token.text.isspace())]


def _control_pattern(control: Sequence[AddedToken]) -> re.Pattern[str]:
    """Matches a control token, longest first, with the white space that it swallows; its text is the group matched."""
    longest_first = sorted(control, key=lambda token: len(token.text), reverse=True)
    return re.compile("|".join(map(_token_pattern, longest_first)) or "(?!)")


def _token_pattern(token: AddedToken) -> str:
    text = f"({re.escape(token.text)})"
    if token.single_word:
        text = rf"(?<!\w){text}(?!\w)"
    return (r"\s*" if token.lstrip else "") + text + (r"\s*" if token.rstrip else "")


def _assistant_markup(control: Sequence[AddedToken], constants: frozenset[str]) -> re.Pattern[str] | None:
    """Matches, in an answer, markup that stays as it is or else one character to hide; None if all are to be hidden.

    Answers may hold what the model itself wrote: added tokens that are not special (`</think>`), and strings by which
    the template takes an answer apart. None of them may contribute to a special token.
    """
    first_characters = {token.text[0] for token in control}
    special = [token.text for token in control if token.is_special]
    own = {token.text for token in control if not token.is_special}
    kept = [
        text
        for text in own | constants
        if text
        and text[0] in first_characters
        and not first_characters.intersection(text[1:])
        and not any(text in other or other in text for other in special)
    ]
    if not kept:
        return None
    longest_first = sorted(kept, key=len, reverse=True)
    hidden = "".join(map(re.escape, sorted(first_characters)))
    return re.compile("|".join([*map(re.escape, longest_first), f"[{hidden}]"]))
