"""A tiny engine with the interface of `serving.engine.engine.Engine`, for tests of the process and its client.

It answers "0 ", "1 ", ... one token per step and sequence. A prompt's first id asks for misbehaviour.
"""

from __future__ import annotations

import time

from quant.errors import CheckpointError
from serving.engine.requests import (
    CancelRequest,
    EngineEvent,
    EngineRequest,
    EngineStats,
    GenerateRequest,
    PoolEvent,
    PoolRequest,
    ScoreEvent,
    StepReport,
    TokenEvent,
)
from serving.engine.wire import EngineSettings
from serving.errors import PromptTooLong

MAX_CONTEXT = 64
CRASH, HANG, TOO_LONG = 100, 101, 102


class ScriptedEngine:
    max_context = MAX_CONTEXT
    kernel_name = "scripted"

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], tuple[EngineRequest, int]] = {}
        self._cancelled: list[CancelRequest] = []
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def submit(self, request: EngineRequest) -> None:
        ids = request.prompt_ids if isinstance(request, GenerateRequest) else request.ids
        if ids[0] == TOO_LONG:
            raise PromptTooLong(len(ids), MAX_CONTEXT)
        for choice_index in range(request.num_choices if isinstance(request, GenerateRequest) else 1):
            self._open[request.request_id, choice_index] = (request, 0)

    def cancel(self, request: CancelRequest) -> None:
        self._cancelled.append(request)

    def step(self) -> StepReport:
        events: list[EngineEvent] = []
        freed = self._drop_cancelled(events)
        for key, (request, num_done) in list(self._open.items()):
            events.append(self._advance(key, request, num_done))
        self._num_steps += 1
        return StepReport(events=events, stats=self.stats(freed))

    def stats(self, freed_request_ids: list[str] | None = None) -> EngineStats:
        return EngineStats(
            num_running=len(self._open),
            num_waiting=0,
            num_free_blocks=8 - len(self._open),
            num_total_blocks=8,
            num_steps=self._num_steps,
            num_prompt_tokens=0,
            num_generated_tokens=0,
            freed_request_ids=freed_request_ids or [],
        )

    def _drop_cancelled(self, events: list[EngineEvent]) -> list[str]:
        freed: list[str] = []
        for cancel in self._cancelled:
            for request_id, choice_index in [key for key in self._open if key[0] == cancel.request_id]:
                if cancel.choice_index in (None, choice_index):
                    del self._open[request_id, choice_index]
                    freed.append(request_id)
                    events.append(_token(request_id, choice_index, 0, "", is_last=True, reason="cancelled"))
        self._cancelled.clear()
        return freed

    def _advance(self, key: tuple[str, int], request: EngineRequest, num_done: int) -> EngineEvent:
        if not isinstance(request, GenerateRequest):
            del self._open[key]
            if isinstance(request, PoolRequest):
                return PoolEvent(request_id=request.request_id, values=[1.5])
            return ScoreEvent(request_id=request.request_id, logprobs=[])
        if request.prompt_ids[0] == CRASH and num_done == 2:
            raise RuntimeError("scripted crash")
        if request.prompt_ids[0] == HANG and num_done == 2:
            time.sleep(3600)
        is_last = num_done + 1 == request.sampling.max_tokens
        if is_last:
            del self._open[key]
        else:
            self._open[key] = (request, num_done + 1)
        return _token(*key, num_done, f"{num_done} ", is_last=is_last)


def _token(
    request_id: str, choice_index: int, token_id: int, text: str, *, is_last: bool, reason: str = "length"
) -> TokenEvent:
    return TokenEvent(
        request_id=request_id,
        choice_index=choice_index,
        token_ids=[token_id],
        text=text,
        finish_reason=None if not is_last else "cancelled" if reason == "cancelled" else "length",
    )


def scripted(settings: EngineSettings) -> ScriptedEngine:
    return ScriptedEngine()


def broken_checkpoint(settings: EngineSettings) -> ScriptedEngine:
    raise CheckpointError(f"{settings.directory}: config.json is missing")


def breaks_while_loading(settings: EngineSettings) -> ScriptedEngine:
    raise MemoryError("scripted")
