"""The PTX term: log-likelihood of text that the policy must not forget, added to the objective.

InstructGPT (arXiv:2203.02155, equation 2) maximises E[reward] + gamma * E[log-likelihood of pretraining text]. Here
both are means over tokens, and the mixture is stated by settings: so many rows of plain text, the rest conversations
with the loss on the assistant's tokens, as in SFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from quant.model_directory import DataFile
from serving.model.chat_format import ChatFormat
from serving.model.tokenizer import ModelTokenizer
from training.batches import Batch, Sample, pad_rows
from training.data.load import LoadPolicy, load_conversations, load_documents
from training.data.records import Conversation, Document
from training.errors import DataError, TrainingError
from training.loop import parts, rows_of_step
from training.prompts import require_chat_format
from training.roles import LanguageModel
from training.settings import PpoSettings
from training.sft import render_sample
from training.trunk import Trunk


@dataclass(frozen=True, slots=True)
class PtxMixture:
    """texts, conversations: rows to draw from. num_texts, num_conversations: rows of each in an optimizer step."""

    texts: tuple[Sample, ...]
    conversations: tuple[Sample, ...]
    num_texts: int
    num_conversations: int
    files: tuple[DataFile, ...]

    def of_step(self, step: int, seed: int) -> list[Sample]:
        """The rows of optimizer step `step`, counted over the whole run."""
        chosen: list[Sample] = []
        for rows, count in ((self.texts, self.num_texts), (self.conversations, self.num_conversations)):
            if count:
                places = rows_of_step(step, num_rows=len(rows), batch_size=count, seed=seed)
                chosen += [rows[place] for place in places]
        return chosen


class PtxObjective:
    """Minus the log-likelihood times the coefficient, to be divided by the target tokens."""

    def __init__(self, policy: LanguageModel, mixture: PtxMixture, settings: PpoSettings) -> None:
        """policy: at temperature 1, whatever answers are sampled at."""
        self._policy, self._mixture, self._settings = policy, mixture, settings

    def micro_batches(self, step: int) -> Sequence[Batch]:
        samples = self._mixture.of_step(step, self._settings.seed)
        by_length = sorted(samples, key=lambda sample: len(sample.ids), reverse=True)
        return [pad_rows(part) for part in parts(by_length, self._settings.micro_batch_size)]

    def weight(self, batch: Batch) -> float:
        return float(batch.num_targets)

    def num_tokens(self, batch: Batch) -> int:
        return int((batch.sample_ids > 0).sum())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        cross_entropy = -self._policy.logprobs(batch).sum()
        return self._settings.ptx_coefficient * cross_entropy, {"ptx_loss": float(cross_entropy.detach())}


def read_mixture(settings: PpoSettings, trunk: Trunk, policy: LoadPolicy) -> PtxMixture | None:
    """None where the settings ask for no PTX term. Raises TrainingError if they ask for one that has no effect."""
    if settings.ptx == "none":
        return None
    num_texts = round(settings.ptx_text_share * settings.ptx_batch_size)
    num_conversations = settings.ptx_batch_size - num_texts
    _require_rows(settings, num_texts, num_conversations)
    documents = load_documents(settings.ptx_text, policy) if num_texts else None
    conversations = load_conversations(settings.ptx_conversations, policy) if num_conversations else None
    files = (documents.files if documents else ()) + (conversations.files if conversations else ())
    return PtxMixture(
        texts=text_samples(documents.rows, trunk.tokenizer, settings.ptx_length) if documents else (),
        conversations=(
            conversation_samples(conversations.rows, require_chat_format(trunk), settings.ptx_length)
            if conversations
            else ()
        ),
        num_texts=num_texts,
        num_conversations=num_conversations,
        files=files,
    )


def text_samples(documents: Sequence[Document], tokenizer: ModelTokenizer, length: int) -> tuple[Sample, ...]:
    """Each text cut into rows of `length`, every token a target; rests shorter than a quarter of a row are left out."""
    samples: list[Sample] = []
    for document in documents:
        ids = tokenizer.encode_prompt(document.text)
        for start in range(0, len(ids), length):
            part = tuple(ids[start : start + length])
            if len(part) >= length // 4 or start == 0:
                samples.append(Sample(part, (True,) * len(part)))
    return _with_targets(samples, "text")


def conversation_samples(
    conversations: Sequence[Conversation], chat_format: ChatFormat, length: int
) -> tuple[Sample, ...]:
    """As SFT renders them; those whose first answer does not fit are left out."""
    samples = [render_sample(conversation.messages, chat_format, length) for conversation in conversations]
    return _with_targets([sample for sample in samples if sample is not None], "conversation")


def _with_targets(samples: Sequence[Sample], kind: str) -> tuple[Sample, ...]:
    kept = tuple(sample for sample in samples if sample.num_targets)
    if not kept:
        raise DataError(f"no PTX {kind} row holds a token to learn; give other files, or raise --ptx-length")
    return kept


def _require_rows(settings: PpoSettings, num_texts: int, num_conversations: int) -> None:
    for flag, files, count in (
        ("--ptx-text", settings.ptx_text, num_texts),
        ("--ptx-conversations", settings.ptx_conversations, num_conversations),
    ):
        if count and not files:
            raise TrainingError(f"the PTX mixture takes {count} rows a step of {flag}, which names no file")
        if files and not count:
            raise TrainingError(f"{flag} has no effect: with these shares the PTX mixture takes no row of it")
    if settings.ptx_coefficient == 0:
        raise TrainingError("--ptx mixture has no effect with --ptx-coefficient 0; use --ptx none")
