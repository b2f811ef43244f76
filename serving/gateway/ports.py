"""What the gateway needs from the rest of the product, as protocols and plain records.

`serving.serve` builds one `Services` and hands it to `serving.gateway.app.build_app`; tests build one from fakes.
Nothing here does work: the engine, the tokenizer, the chat format and the moderation policy come in as objects.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from serving.errors import EngineStopped, Unavailable

if TYPE_CHECKING:
    from moderation.categories import Category
    from moderation.policy import Direction, PolicyOptions, Turn, Verdict
    from serving.engine.requests import EngineEvent, EngineRequest, EngineStats
    from serving.metrics import Metrics
    from serving.model.chat_format import ChatMessage

OnFlagged = Literal["error", "refuse"]
ModerationMode = Literal["off", "log", "block"]
OnFailure = Literal["closed", "open"]
Outcome = Literal["passed", "logged", "blocked", "failed_open", "failed_closed"]


class EventStream(Protocol):
    """The events of one request. Closing it before its terminal event cancels the request in the engine."""

    def __aiter__(self) -> AsyncIterator[EngineEvent]: ...
    async def __anext__(self) -> EngineEvent: ...
    async def aclose(self) -> None: ...


class EnginePort(Protocol):
    """The shape of `serving.engine.client.EngineClient`."""

    @property
    def state(self) -> str: ...  # an EngineState: "starting", "ready", "restarting", "failed", "closed"
    @property
    def stats(self) -> EngineStats | None: ...
    @property
    def max_context(self) -> int | None: ...
    def seconds_since_progress(self) -> float | None:
        """None when nothing is queued or running."""
        ...

    def submit(self, request: EngineRequest) -> EventStream:
        """Raises QueueFull or EngineStopped here or from the first iteration."""
        ...

    async def cancel(self, request_id: str, choice_index: int | None = None) -> bool: ...


class TokenizerPort(Protocol):
    """The part of `serving.model.tokenizer.ModelTokenizer` that the routes use."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def token_bytes(self) -> Sequence[bytes]: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...
    def token_text(self, token_id: int, /) -> str: ...


class ChatFormatPort(Protocol):
    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> list[int]: ...


class ModerationPort(Protocol):
    """The shape of `moderation.policy.Policy`."""

    @property
    def model_id(self) -> str: ...
    @property
    def options(self) -> PolicyOptions: ...
    @property
    def trained_categories(self) -> tuple[Category, ...]: ...
    @property
    def trained_extensions(self) -> tuple[str, ...]: ...
    def judge_input(self, turns: Sequence[Turn]) -> Verdict: ...
    def judge_texts(self, texts: Sequence[str]) -> list[Verdict]: ...
    def judge_output(self, context: str, text: str) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class DirectionRules:
    """What is done with what goes in, or with what comes out.

    mode: "block" refuses what is flagged, "log" counts and records it and lets it pass, "off" does not judge
    fail: without a verdict "closed" answers 503, "open" lets the text pass; in mode "log" it always passes
    """

    mode: ModerationMode = "block"
    fail: OnFailure = "closed"


@dataclass(frozen=True, slots=True)
class ModerationRules:
    """What is in force for one request.

    message:      what a refusal says, in place of the gateway's own words
    records_text: decisions and turns that were flagged reach the sink with their text; otherwise without any
    """

    policy: ModerationPort
    input: DirectionRules = DirectionRules()
    output: DirectionRules = DirectionRules()
    on_flagged: OnFlagged = "error"
    message: str | None = None
    records_text: bool = False

    def of(self, direction: Direction) -> DirectionRules:
        return self.input if direction == "input" else self.output


# By the name of the API key that a request came with; None where the server has no key.
RulesOfKey = Callable[[str | None], ModerationRules]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json says; None leaves OpenAI's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model that answers. `chat_format` is None for a base model without a chat template."""

    model_id: str
    tokenizer: TokenizerPort
    chat_format: ChatFormatPort | None
    max_context: int
    created: int  # seconds since the epoch
    defaults: GenerationDefaults = GenerationDefaults()


@dataclass(frozen=True, slots=True)
class Preparation:
    """How far the first-run preparation is. `total` is 0 while it is unknown."""

    stage: str
    done: float = 0.0
    total: float = 0.0

    @property
    def percent(self) -> float | None:
        return round(100.0 * min(self.done / self.total, 1.0), 1) if self.total > 0 else None


@dataclass(slots=True)
class Readiness:
    """What the server waits for. Written by the composition root, read by the routes.

    `preparation` is set while a model is being prepared, `model` once there is one, `failure` when there never will be.
    """

    engine: EnginePort
    preparation: Preparation | None = None
    model: ServedModel | None = None
    failure: str | None = None
    retry_after_s: int = 5

    def waiting_for(self) -> str | None:
        """One line for people, or None when requests are answered."""
        if self.failure is not None:
            return self.failure
        if self.model is None:
            return f"the model is being prepared: {self.preparation.stage}" if self.preparation else "the model"
        if self.engine.state != "ready":
            return f"the engine is {self.engine.state}"
        return None

    def require_model(self) -> ServedModel:
        """The model, or Unavailable with the reason and a Retry-After."""
        reason = self.waiting_for()
        if reason is None and self.model is not None:
            return self.model
        kind = Unavailable if self.model is None else EngineStopped
        raise kind(f"not ready to answer yet: {reason}", retry_after_s=self.retry_after_s)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    max_body_bytes: int = 4 * 1024 * 1024
    max_messages: int = 512
    max_choices: int = 16  # `n`, and for completions prompts times `n`
    max_stop: int = 4
    max_stop_length: int = 256  # characters
    max_tokens: int = 32_768


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The part of the configuration that the gateway reads. `api_key` None lets everybody in (loopback only)."""

    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()  # besides loopback names; "*" allows any, "*.example.org" its subdomains
    allowed_origins: tuple[str, ...] = ()  # besides the server's own
    limits: RequestLimits = RequestLimits()
    shares_prefix_cache: bool = False  # between API keys
    stall_after_s: float = 30.0
    ping_interval_s: float = 15.0


@dataclass(frozen=True, slots=True)
class ChoiceRecord:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One answered or refused turn, for the store that comes with the feedback loop.

    `verdict` is that on the input; None when it was not judged. A turn in which something was flagged has no text and
    no ids, unless the rules say that text is recorded.
    """

    request_id: str
    model_id: str
    turns: tuple[Turn, ...]
    verdict: Verdict | None
    prompt_ids: tuple[int, ...]
    choices: tuple[ChoiceRecord, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What moderation decided about one request's input or about one choice, for a review queue.

    choice_index: None for input
    verdict:      with score, threshold, model and reason; None when there was none ("failed_…")
    text:         what was flagged: the user's turns, or the window of the answer. Only if the rules say so
    """

    request_id: str
    direction: Direction
    choice_index: int | None
    outcome: Outcome
    verdict: Verdict | None
    text: str | None = None


class TurnSink(Protocol):
    """The answer waits for both, so they return soon. What they raise is logged and changes no answer."""

    async def record(self, turn: TurnRecord) -> None: ...
    async def record_decision(self, decision: Decision) -> None: ...


class NoSink:
    """Keeps nothing."""

    async def record(self, turn: TurnRecord) -> None:
        return None

    async def record_decision(self, decision: Decision) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the routes use; one per app."""

    settings: GatewaySettings
    engine: EnginePort
    readiness: Readiness
    rules_of_key: RulesOfKey
    metrics: Metrics
    sink: TurnSink = field(default_factory=NoSink)
