"""What travels between the gateway and the engine process, beside the records of `serving.engine.requests`.

Two one-way ZeroMQ sockets over ipc in a private directory: requests in, one message per engine step out. Every message
is one msgpack frame. Both ends import this file and nothing heavier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from serving.engine.requests import CancelRequest, EngineStats, GenerateRequest, PoolRequest, ScoreRequest, StepReport

__all__ = [
    "EngineSettings",
    "Fatal",
    "FromEngine",
    "Heartbeat",
    "Ready",
    "Shutdown",
    "Stepped",
    "ToProcess",
    "decode_from_engine",
    "decode_to_process",
    "encode",
    "inbox_address",
    "outbox_address",
]


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process is started with; it carries no secret, since it is visible in the process list."""

    directory: str  # the model directory
    kv_bytes: int
    exact: bool = False
    prefix_cache: bool = True
    prompt_lookup: bool = False
    int8_kv: bool = False
    load_in: Literal["nf4", "int8"] | None = None
    max_running: int = 64
    max_waiting: int = 256
    max_step_tokens: int = 256
    prefill_slowdown: float = 2.5
    compute_threads: int | None = None
    log_format: str = "text"
    log_level: int = 20
    heartbeat_s: float = 2.0
    factory: str | None = None  # 'module:function' from settings to an engine: tests put their own here


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave now; whoever wanted the answers is gone."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    max_context: int
    stats: EngineStats
    load_seconds: float
    kernel: str  # which matrix path was chosen at start


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent while there is nothing to do."""

    stats: EngineStats


class Stepped(msgspec.Struct, frozen=True, tag="step"):
    report: StepReport


class Fatal(msgspec.Struct, frozen=True, kw_only=True, tag="fatal"):
    """The last message of a process that gives up. `checkpoint`: trying again cannot help."""

    kind: Literal["checkpoint", "internal"]
    message: str


ToProcess: TypeAlias = GenerateRequest | ScoreRequest | PoolRequest | CancelRequest | Shutdown
FromEngine: TypeAlias = Ready | Heartbeat | Stepped | Fatal

encode = msgspec.msgpack.Encoder().encode
decode_to_process = msgspec.msgpack.Decoder(ToProcess).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def inbox_address(directory: Path) -> str:
    """Where the engine process receives."""
    return f"ipc://{directory / 'in'}"


def outbox_address(directory: Path) -> str:
    """Where the engine process sends."""
    return f"ipc://{directory / 'out'}"
