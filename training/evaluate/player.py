"""A model under evaluation: an engine in this process, the chat format, and how answers and log-probabilities are had.

Everything goes through the serving engine, so a quantised directory is judged as it will be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from quant.errors import CheckpointError
from quant.progress import ProgressSink
from serving.engine.engine import Engine
from serving.engine.load import load_engine
from serving.engine.requests import (
    EngineEvent,
    FailedEvent,
    GenerateRequest,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
)
from serving.engine.scheduler import EngineLimits
from serving.model.chat_format import ChatFormat, NoChatTemplateError
from serving.model.tokenizer import TOKENIZER_FILE, ModelTokenizer
from training.errors import TrainingError

__all__ = ["EnginePrecision", "Player", "load_player"]

EnginePrecision: TypeAlias = Literal["bfloat16", "float32"]
Request = TypeVar("Request", GenerateRequest, ScoreRequest)

# An evaluation submits whole prompt sets at once: the queue's bound protects servers, not this.
_LIMITS = EngineLimits(max_running=64, max_waiting=1_000_000, max_step_tokens=512, prefill_slowdown=None)


@dataclass(frozen=True, slots=True)
class Player:
    """name: of the directory, without its path. chat_format: None for a base model."""

    name: str
    engine: Engine
    tokenizer: ModelTokenizer
    tokenizer_json: str
    chat_format: ChatFormat | None

    @property
    def max_context(self) -> int:
        return self.engine.max_context

    def chat(self) -> ChatFormat:
        """Raises TrainingError for a base model."""
        if self.chat_format is None:
            raise TrainingError(f"{self.name} has no chat template, so it cannot answer; it can take --measures texts")
        return self.chat_format

    def logprobs(self, sequences: Sequence[Sequence[int]], progress: ProgressSink, stage: str) -> list[list[float]]:
        """For each sequence of at least 2 ids, the natural log-probability of every id after the first."""
        requests = [ScoreRequest(request_id=str(i), ids=list(ids)) for i, ids in enumerate(sequences)]
        found: dict[str, list[float]] = {}
        for event in self.run(requests, progress, stage):
            assert isinstance(event, ScoreEvent)
            found[event.request_id] = [scored.logprob for scored in event.logprobs]
        return [found[str(i)] for i in range(len(sequences))]

    def run(self, requests: Sequence[Request], progress: ProgressSink, stage: str) -> list[EngineEvent]:
        """All events of these requests. Raises TrainingError if the engine refuses one."""
        events: list[EngineEvent] = []
        total = sum(request.num_choices if isinstance(request, GenerateRequest) else 1 for request in requests)
        num_ended = 0
        for request in requests:
            self.engine.submit(request)
        while self.engine.has_work:
            step = self.engine.step().events
            for event in step:
                if isinstance(event, FailedEvent):
                    raise TrainingError(f"{self.name}: the engine failed on {event.request_id}: {event.message}")
            events += step
            ended = sum(not isinstance(event, TokenEvent) or event.finish_reason is not None for event in step)
            if ended:
                num_ended += ended
                progress.update(stage, num_ended, total)
        return events


def load_player(directory: Path, *, precision: EnginePrecision, kv_megabytes: int) -> Player:
    """Raises CheckpointError for a directory that the engine cannot serve."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no model directory")
    kv_bytes, exact = kv_megabytes * 2**20, precision == "float32"
    # Without a prefix cache, the last digits of an answer's log-probabilities do not depend on what was asked before.
    engine = load_engine(directory, kv_bytes=kv_bytes, exact=exact, limits=_LIMITS, prefix_cache=False)
    # float32 weights, but whole batches at a time: the plain path's one-by-one products are not needed here.
    engine.model = replace(engine.model, is_exact=False)
    tokenizer = ModelTokenizer.load(directory)
    try:
        chat_format = ChatFormat.load(directory, tokenizer)
    except NoChatTemplateError:
        chat_format = None
    tokenizer_json = (directory / TOKENIZER_FILE).read_text(encoding="utf-8")
    return Player(directory.absolute().name, engine, tokenizer, tokenizer_json, chat_format)
