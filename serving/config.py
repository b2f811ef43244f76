"""Every setting of `causerie serve`, as frozen records that are valid once they exist, and as a flat list of keys.

Where values come from (default < TOML file < CAUSERIE_* environment < flag) is up to `serving.config_sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

from moderation.categories import Category
from serving.errors import ConfigError
from serving.log import LogFormat
from serving.setting_values import (
    boolean,
    choice,
    integer,
    member,
    names,
    number,
    numbers_by_name,
    optional,
    path,
    share,
    size,
    text,
)

__all__ = [
    "API_KEY_VARIABLE",
    "ENV_PREFIX",
    "About",
    "ConfigError",
    "DirectionConfig",
    "LimitsConfig",
    "ModerationConfig",
    "ServeConfig",
    "Setting",
    "checked_value",
    "settings",
]

ENV_PREFIX = "CAUSERIE_"
API_KEY_VARIABLE = "CAUSERIE_API_KEY"

OnFlagged: TypeAlias = Literal["error", "refuse"]
Mode: TypeAlias = Literal["off", "log", "block"]
Preset: TypeAlias = Literal["strict", "balanced", "lenient", "none"]
Fail: TypeAlias = Literal["closed", "open"]
Speculative: TypeAlias = Literal["off", "prompt-lookup"]
KVCacheDtype: TypeAlias = Literal["bfloat16", "int8"]
LoadIn: TypeAlias = Literal["nf4", "int8"]
# What may have a threshold of its own: OpenAI's categories, and what the classifier knows besides.
_SCORED_NAMES = (*(category.value for category in Category), "jailbreak")
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class About:
    """What a field's metadata holds. `name` is what people write, where that differs from the field."""

    read: Callable[[object], object]
    help: str
    name: str | None = None


def _about(read: Callable[[object], object], about: str, *, name: str | None = None) -> dict[str, About]:
    return {"about": About(read, about, name)}


class _Checked:
    """Validates every field at construction, so that a config in hand is a valid one."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for setting in fields(cast("type[ServeConfig]", type(self))):
            if "about" in setting.metadata:
                checked_value(setting.name, setting.metadata["about"], getattr(self, setting.name), "given")


@dataclass(frozen=True, slots=True)
class DirectionConfig(_Checked):
    """`[moderation.input]` and `[moderation.output]`."""

    mode: Mode = field(
        default="block",
        metadata=_about(
            choice("off", "log", "block"),
            "block what is flagged, only count and record it (log), or judge nothing (off)",
        ),
    )
    preset: Preset = field(
        default="balanced",
        metadata=_about(
            choice("strict", "balanced", "lenient", "none"),
            "how soon to flag: strict, balanced or lenient; none leaves it to `thresholds` alone",
        ),
    )
    thresholds: Mapping[str, float] = field(
        default_factory=dict[str, float],
        metadata=_about(
            numbers_by_name(_SCORED_NAMES, 0, 1),
            "flag besides by single categories: a table, or a text such as hate=0.5,violence=0.8",
        ),
    )
    fail: Fail = field(
        default="closed",
        metadata=_about(choice("closed", "open"), "without a verdict: answer 503 (closed), or let it pass (open)"),
    )


@dataclass(frozen=True, slots=True)
class ModerationConfig(_Checked):
    threshold: float | None = field(
        default=None,
        metadata=_about(
            optional(number(0, 1, ends_allowed=False)),
            "flag from this probability on, in both directions; absent: the preset's, chosen on held-out text",
        ),
    )
    on_flagged: OnFlagged = field(
        default="error",
        metadata=_about(choice("error", "refuse"), "answer flagged input with a 400 (error) or a refusal (refuse)"),
    )
    message: str | None = field(
        default=None, metadata=_about(optional(text), "what a refusal tells the user; absent: a sentence of ours")
    )
    record_text: bool = field(
        default=False,
        metadata=_about(boolean, "record the text of flagged turns for review, not only their scores"),
    )
    # Tables come last, as TOML wants it.
    input: DirectionConfig = field(default_factory=DirectionConfig)
    output: DirectionConfig = field(default_factory=DirectionConfig)


@dataclass(frozen=True, slots=True)
class LimitsConfig(_Checked):
    max_body_bytes: int = field(
        default=4 * 1024 * 1024, metadata=_about(size(1024), "largest request body, such as 4MiB")
    )
    max_messages: int = field(default=512, metadata=_about(integer(1), "messages in one chat request"))
    max_choices: int = field(default=16, metadata=_about(integer(1, 128), "choices (`n`) of one request"))
    max_stop: int = field(default=4, metadata=_about(integer(0, 64), "stop strings of one request"))
    max_stop_length: int = field(default=256, metadata=_about(integer(1), "characters of one stop string"))
    max_tokens: int = field(default=32_768, metadata=_about(integer(1), "tokens one request may ask for"))
    max_waiting: int = field(
        default=256, metadata=_about(integer(1), "sequences that may wait; more are answered 429 with Retry-After")
    )
    max_running: int = field(default=64, metadata=_about(integer(1, 1024), "sequences in one batch"))


@dataclass(frozen=True, slots=True)
class ServeConfig(_Checked):
    model: str = field(
        default="smollm2-135m-instruct",
        metadata=_about(text, "a name of `causerie models list`, a model directory, or a Hugging Face id"),
    )
    host: str = field(
        default="127.0.0.1", metadata=_about(text, "address to listen on; one that is not loopback needs an API key")
    )
    port: int = field(default=8000, metadata=_about(integer(0, 65_535), "port to listen on; 0 takes a free one"))
    kv_memory_bytes: int = field(
        default=512 * 1024 * 1024,
        metadata=_about(size(1024 * 1024), "memory for the key/value cache, such as 512MiB", name="kv_memory"),
    )
    kv_cache_dtype: KVCacheDtype = field(
        default="bfloat16",
        metadata=_about(
            choice("bfloat16", "int8"),
            "how keys and values are kept; int8 holds almost twice the tokens in `kv_memory`; not with `exact`",
        ),
    )
    exact: bool = field(
        default=False,
        metadata=_about(boolean, "plain path: dequantised fp32 weights, each sequence by itself; slow, reproducible"),
    )
    load_in: LoadIn | None = field(
        default=None,
        metadata=_about(
            optional(choice("nf4", "int8")),
            "round the source's weights with bitsandbytes while loading instead of serving it as GPTQ; slow on a CPU",
        ),
    )
    min_top1_agreement: float | None = field(
        default=None,
        metadata=_about(
            optional(share),
            "refuse a model that agrees with its source on fewer tokens, by its quantisation report: 0.95 or 95%",
        ),
    )
    prefix_cache: bool = field(
        default=True,
        metadata=_about(boolean, "do not compute the beginning of a prompt again while it is still in the cache"),
    )
    share_prefix_cache: bool = field(
        default=False,
        metadata=_about(boolean, "one prefix cache for all API keys: faster, but timing tells what others have asked"),
    )
    speculative: Speculative = field(
        default="off",
        metadata=_about(
            choice("off", "prompt-lookup"),
            "prompt-lookup: guess what an answer repeats and keep what was right: fewer steps",
        ),
    )
    api_key_file: Path | None = field(
        default=None, metadata=_about(optional(path), f"file with the API key; or set {API_KEY_VARIABLE}")
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(), metadata=_about(names, "Host headers accepted besides loopback and `host`; *.example.org works")
    )
    allowed_origins: tuple[str, ...] = field(
        default=(), metadata=_about(names, "web origins that may call the API besides the server's own page")
    )
    prefill_chunk_tokens: int = field(
        default=256,
        metadata=_about(
            integer(16, 8192), "tokens of one engine step over all sequences; a prompt alone takes them all"
        ),
    )
    prefill_slowdown: float = field(
        default=2.5,
        metadata=_about(
            number(1.1, 100), "beside running streams, prompts make a step at most this many times as long, by estimate"
        ),
    )
    compute_threads: int | None = field(
        default=None, metadata=_about(optional(integer(1, 512)), "engine threads; absent: OMP_NUM_THREADS or all cores")
    )
    stall_after_s: float = field(
        default=60.0,
        metadata=_about(number(1, 3600), "no engine step for this long while work is queued: it is restarted"),
    )
    shutdown_grace_s: float = field(
        default=5.0, metadata=_about(number(0, 600), "how long answers in flight may go on after Ctrl-C or SIGTERM")
    )
    log_format: LogFormat = field(
        default=LogFormat.TEXT, metadata=_about(member(LogFormat), "text (key=value lines) or json")
    )
    log_level: LogLevel = field(
        default="info", metadata=_about(choice("debug", "info", "warning", "error"), "least severe line to log")
    )
    # Tables come last, as TOML wants it.
    moderation: ModerationConfig = field(default_factory=ModerationConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of ServeConfig. `key` is its name in the TOML file, tables joined by dots."""

    key: str
    field_path: tuple[str, ...]
    default: object
    about: About

    @property
    def flag(self) -> str:
        return "--" + self.key.replace(".", "-").replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.key.replace(".", "_").upper()

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def help(self) -> str:
        return self.about.help

    @property
    def metavar(self) -> str:
        return self.field_path[-1].rpartition("_")[2].upper()

    @property
    def shown_default(self) -> str:
        """As people write it: a size has a unit."""
        if self.field_path[-1].endswith("_bytes") and isinstance(self.default, int):
            return f"{self.default >> 20}MiB"
        return str(self.default)


def settings() -> Iterator[Setting]:
    """All settings, in the order they are documented and printed."""
    yield from _leaves(ServeConfig(), ())


def _leaves(record: object, parents: tuple[str, ...]) -> Iterator[Setting]:
    for entry in fields(cast("ServeConfig", record)):
        value = getattr(record, entry.name)
        if is_dataclass(value):
            yield from _leaves(value, (*parents, entry.name))
            continue
        about: About = entry.metadata["about"]
        yield Setting(".".join((*parents, about.name or entry.name)), (*parents, entry.name), value, about)


def checked_value(key: str, about: About, raw: object, origin: str) -> object:
    try:
        return about.read(raw)
    except ValueError as error:
        raise ConfigError(f"{key} must be {error}; got {raw!r} ({origin})") from None
