"""Stand-ins at the gateway's own seams: an engine that plays a script, a byte tokenizer, a policy that reads a word."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

import httpx
from fastapi import FastAPI

from moderation.categories import Category
from moderation.policy import PolicyOptions, Turn, Verdict
from serving.engine.requests import (
    EngineEvent,
    EngineRequest,
    EngineStats,
    FailedEvent,
    FinishReason,
    GenerateRequest,
    PoolEvent,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
    TokenLogprob,
)
from serving.errors import ServiceError
from serving.gateway.app import build_app
from serving.gateway.ports import (
    Decision,
    DirectionRules,
    GatewaySettings,
    GenerationDefaults,
    ModerationMode,
    ModerationRules,
    NoSink,
    OnFailure,
    Readiness,
    ServedModel,
    Services,
    TurnRecord,
    TurnSink,
)
from serving.metrics import Metrics
from serving.model.chat_format import ChatMessage

EOS = 256
VOCAB_SIZE = 257
MODEL_ID = "tiny"

Step = EngineEvent | ServiceError
Script = Callable[[EngineRequest], Sequence[Step]]


class ByteTokenizer:
    """Token i is byte i; 256 ends a turn."""

    vocab_size = VOCAB_SIZE
    eos_ids = frozenset({EOS})
    token_bytes: Sequence[bytes] = [*(bytes([value]) for value in range(256)), b""]

    def encode_prompt(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return b"".join(self.token_bytes[token_id] for token_id in ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return "<end>" if token_id == EOS else chr(token_id)


class PlainChatFormat:
    """`role:content` lines."""

    def __init__(self) -> None:
        self.rendered: list[Sequence[ChatMessage]] = []

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> list[int]:
        self.rendered.append(messages)
        return list("".join(f"{message.role}:{message.content}\n" for message in messages).encode())


class WordPolicy:
    """Flags what contains "bomb"; fails on "crash". Nothing else is even suspicious."""

    model_id = "words-1"
    options = PolicyOptions()
    trained_categories = (Category.HATE,)
    trained_extensions = ("jailbreak",)

    def __init__(self) -> None:
        self.judged: list[Sequence[Turn]] = []
        self.windows: list[tuple[str, str]] = []

    def judge_input(self, turns: Sequence[Turn]) -> Verdict:
        self.judged.append(turns)
        return self.judge_texts(["\n".join(turn.content for turn in turns)])[0]

    def judge_texts(self, texts: Sequence[str]) -> list[Verdict]:
        if any("crash" in text for text in texts):
            raise RuntimeError("the classifier is broken")
        return [verdict("bomb" in text) for text in texts]

    def judge_output(self, context: str, text: str) -> Verdict:
        self.windows.append((context, text))
        return self.judge_texts([context + text])[0]


class ListSink:
    def __init__(self) -> None:
        self.turns: list[TurnRecord] = []
        self.decisions: list[Decision] = []

    async def record(self, turn: TurnRecord) -> None:
        self.turns.append(turn)

    async def record_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)


def make_rules(
    *,
    input: ModerationMode = "block",
    output: ModerationMode = "off",
    fail: OnFailure = "closed",
    **fields: object,
) -> ModerationRules:
    """Output is not judged unless a test asks for it: most are about something else."""
    directions = {"input": DirectionRules(input, fail), "output": DirectionRules(output, fail)}
    return ModerationRules(**({"policy": WordPolicy()} | directions | fields))  # pyright: ignore[reportArgumentType]


def verdict(flagged: bool) -> Verdict:
    probability = 0.9 if flagged else 0.1
    return Verdict(
        flagged=flagged,
        probability=probability,
        threshold=0.5,
        categories={"illicit": flagged, "hate": False},
        category_scores={"illicit": probability, "hate": 0.0},
        extension_scores={"jailbreak": 0.0},
        reason="moderation" if flagged else None,
        model="words-1",
        severity=probability / 0.5,
    )


class ScriptedStream:
    """Plays its steps, then waits for `push` until every choice has ended. Records being closed before that."""

    def __init__(self, engine: ScriptedEngine, request: EngineRequest, steps: Sequence[Step]) -> None:
        self.request = request
        self.is_closed = asyncio.Event()
        self._engine = engine
        self._steps: deque[Step] = deque(steps)
        self._arrived = asyncio.Event()
        self._num_open = request.num_choices if isinstance(request, GenerateRequest) else 1

    def push(self, *steps: Step) -> None:
        self._steps.extend(steps)
        self._arrived.set()

    def __aiter__(self) -> AsyncIterator[EngineEvent]:
        return self

    async def __anext__(self) -> EngineEvent:
        if self._engine.is_paced:
            for _ in range(4):  # the reader sends what came before the next step comes
                await asyncio.sleep(0)
        while not self._steps:
            if self._num_open == 0:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        step = self._steps.popleft()
        if isinstance(step, ServiceError):
            self._num_open = 0
            raise step
        if isinstance(step, FailedEvent | ScoreEvent | PoolEvent):
            self._num_open = 0
        elif step.finish_reason is not None:
            self._num_open -= 1
        return step

    async def aclose(self) -> None:
        if self._num_open and not self.is_closed.is_set():
            self._engine.abandoned.append(self.request.request_id)
        self.is_closed.set()


class ScriptedEngine:
    """An EnginePort. `script` says what each request's stream plays: at once, or paced, step by step."""

    def __init__(self, script: Script | None = None, *, is_paced: bool = False) -> None:
        self.is_paced = is_paced
        self.state = "ready"
        self.stats: EngineStats | None = None
        self.max_context: int | None = None
        self.stalled_for_s: float | None = None
        self.refusal: ServiceError | None = None
        self.requests: list[EngineRequest] = []
        self.streams: dict[str, ScriptedStream] = {}
        self.cancelled: list[tuple[str, int | None]] = []
        self.abandoned: list[str] = []
        self.has_request = asyncio.Event()
        self.has_cancel = asyncio.Event()
        self._script = script or hello

    def seconds_since_progress(self) -> float | None:
        return self.stalled_for_s

    def submit(self, request: EngineRequest) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        stream = ScriptedStream(self, request, self._script(request))
        self.streams[request.request_id] = stream
        self.has_request.set()
        return stream

    async def cancel(self, request_id: str, choice_index: int | None = None) -> bool:
        self.cancelled.append((request_id, choice_index))
        self.has_cancel.set()
        stream = self.streams[request_id]
        if choice_index is None and isinstance(stream.request, GenerateRequest):
            for index in range(stream.request.num_choices):
                stream.push(token(stream.request, "", index, finish="cancelled"))
        return True

    @property
    def generated(self) -> GenerateRequest:
        """The one generate request that came."""
        (request,) = [request for request in self.requests if isinstance(request, GenerateRequest)]
        return request


def token(
    request: EngineRequest,
    text: str,
    choice_index: int = 0,
    *,
    ids: Sequence[int] | None = None,
    finish: FinishReason | None = None,
) -> TokenEvent:
    token_ids = list(text.encode()) if ids is None else list(ids)
    wants_logprobs = isinstance(request, GenerateRequest) and request.sampling.num_top_logprobs is not None
    return TokenEvent(
        request_id=request.request_id,
        choice_index=choice_index,
        token_ids=token_ids,
        text=text,
        logprobs=[logprob(token_id) for token_id in token_ids] if wants_logprobs else None,
        finish_reason=finish,
    )


def logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -0.5, [(token_id, -0.5), (ord("z"), float("-inf"))])


def say(request: EngineRequest, *texts: str, finish: FinishReason = "stop") -> list[Step]:
    """The texts as one event each for every choice, then the end-of-turn token. Scores what asks for a score."""
    if isinstance(request, ScoreRequest):
        return [ScoreEvent(request_id=request.request_id, logprobs=[logprob(one) for one in request.ids[1:]])]
    assert isinstance(request, GenerateRequest)
    steps: list[Step] = []
    for index in range(request.num_choices):
        steps += [token(request, text, index) for text in texts]
        steps.append(token(request, "", index, ids=[EOS], finish=finish))
    return steps


def hello(request: EngineRequest) -> list[Step]:
    return say(request, "Hello")


def fail(request: EngineRequest, code: str, message: str) -> FailedEvent:
    return FailedEvent(request_id=request.request_id, code=code, message=message)


def make_model(**changes: object) -> ServedModel:
    fields: dict[str, object] = {
        "model_id": MODEL_ID,
        "tokenizer": ByteTokenizer(),
        "chat_format": PlainChatFormat(),
        "max_context": 1000,
        "created": 1_700_000_000,
        "defaults": GenerationDefaults(),
    }
    return ServedModel(**(fields | changes))  # pyright: ignore[reportArgumentType]


def make_services(
    engine: ScriptedEngine | None = None,
    *,
    settings: GatewaySettings | None = None,
    model: ServedModel | None = None,
    sink: TurnSink | None = None,
    rules: ModerationRules | None = None,
) -> Services:
    engine = engine or ScriptedEngine()
    chosen = rules or make_rules()
    return Services(
        settings=settings or GatewaySettings(),
        engine=engine,
        readiness=Readiness(engine=engine, model=model or make_model()),
        rules_of_key=lambda _key_name: chosen,
        metrics=Metrics(),
        sink=sink or NoSink(),
    )


def client_of(app: FastAPI, **options: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)  # pyright: ignore[reportArgumentType]


def client_for(
    engine: ScriptedEngine | None = None,
    *,
    settings: GatewaySettings | None = None,
    rules: ModerationRules | None = None,
    sink: TurnSink | None = None,
) -> httpx.AsyncClient:
    return client_of(build_app(make_services(engine, settings=settings, rules=rules, sink=sink)))


def chat_body(text: str = "Hi", **fields: object) -> dict[str, object]:
    return {"model": MODEL_ID, "messages": [{"role": "user", "content": text}], **fields}
