"""The records that go into the engine and come out of it, in process and over the wire.

`Engine.submit` takes a request, `Engine.step` returns events. Every accepted request ends in exactly one terminal
record per choice: a `TokenEvent` with a `finish_reason`, a `ScoreEvent`, a `PoolEvent` or a `FailedEvent`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to draw tokens. Everything is resolved (defaults of the model applied) before it gets here."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int  # choice i of a request draws from (seed, i): the same text whatever else runs
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_top_logprobs: int | None = None  # None: no log-probabilities; 0: of the chosen token only
    # Log-probabilities are those of softmax(logits / this). 1 is what the API reports; roll-outs give `temperature`.
    logprob_temperature: float = 1.0


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """`cache_salt`, here and below: only requests with the same one share what is cached of their beginnings."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    num_choices: int = 1
    adapter: str | None = None
    cache_salt: str = ""


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True, tag="score"):
    """Log-probabilities of given ids: perplexity, reference log-probabilities, `echo`."""

    request_id: str
    ids: list[int]
    num_top_logprobs: int = 0
    adapter: str | None = None
    cache_salt: str = ""


class PoolRequest(msgspec.Struct, frozen=True, kw_only=True, tag="pool"):
    """The last token's final hidden state, or a named head's output on it."""

    request_id: str
    ids: list[int]
    head: str | None = None
    adapter: str | None = None
    cache_salt: str = ""


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """`choice_index` None cancels every choice of the request."""

    request_id: str
    choice_index: int | None = None


EngineRequest: TypeAlias = GenerateRequest | ScoreRequest | PoolRequest
ToEngine: TypeAlias = GenerateRequest | ScoreRequest | PoolRequest | CancelRequest


class TokenLogprob(msgspec.Struct, frozen=True):
    """Natural log under softmax(logits / `logprob_temperature`): before penalties, top-k and top-p.

    At temperature 1 that is the model's own distribution, as the field reports it.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (token id, logprob), most likely first


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, tag="token"):
    """New tokens of one choice. `text` may be empty (half a character, a held-back stop string), never taken back.

    `token_ids` are the ids sampled since the last event, end-of-turn included. The terminal one has a `finish_reason`.
    `num_reused_tokens` says in each how many tokens of the prompt this choice found in the prefix cache. Choice 0 goes
    first, so its number is what earlier requests had left; the others also find what choice 0 has just computed.
    """

    request_id: str
    choice_index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    num_reused_tokens: int = 0


class ScoreEvent(msgspec.Struct, frozen=True, kw_only=True, tag="score"):
    """One entry per id after the first: the log-probability of ids[i + 1] given ids[: i + 1]."""

    request_id: str
    logprobs: list[TokenLogprob]


class PoolEvent(msgspec.Struct, frozen=True, kw_only=True, tag="pool"):
    request_id: str
    values: list[float]


class FailedEvent(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Terminal for the whole request. `code` is one of `serving.errors` codes."""

    request_id: str
    code: str
    message: str


EngineEvent: TypeAlias = TokenEvent | ScoreEvent | PoolEvent | FailedEvent


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    num_running: int
    num_waiting: int
    num_free_blocks: int  # held by no sequence; `num_idle_blocks` of them hold a beginning that may come again
    num_total_blocks: int
    num_steps: int  # completed since the process started
    num_prompt_tokens: int  # totals since the process started
    num_generated_tokens: int
    # Of the waiting ones: the cache has room, but the step is full or their beginning is just being computed.
    num_awaiting_turn: int = 0
    num_idle_blocks: int = 0
    num_reused_tokens: int = 0  # of prompts, over finished sequences, that were found in the prefix cache
    num_preemptions: int = 0
    num_guessed_tokens: int = 0
    num_guessed_right: int = 0
    freed_request_ids: list[str] = []  # cancelled requests whose blocks went back in this step


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine step sends: every event of the step in one message."""

    events: list[EngineEvent]
    stats: EngineStats
