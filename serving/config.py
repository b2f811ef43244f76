"""Every setting of `causerie serve`: default < TOML file < CAUSERIE_* environment < flag, each with where it came from.

The only file that reads the environment. A key it does not know is refused with the nearest one it does. The API key is
not a setting: it comes from CAUSERIE_API_KEY or the key file, and is never printed.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

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
    "DEFAULT_ORIGIN",
    "ConfigError",
    "DirectionConfig",
    "LimitsConfig",
    "LoadedConfig",
    "ModerationConfig",
    "ServeConfig",
    "Setting",
    "load_config",
    "settings",
]

ENV_PREFIX = "CAUSERIE_"
API_KEY_VARIABLE = "CAUSERIE_API_KEY"
CONFIG_VARIABLE = "CAUSERIE_CONFIG"
# The origin of a setting that nobody gave.
DEFAULT_ORIGIN = "default"
# Read elsewhere (by the cache and the start script), so not unknown here.
_OTHER_VARIABLES = (
    *(API_KEY_VARIABLE, CONFIG_VARIABLE, "CAUSERIE_CACHE"),
    *("CAUSERIE_TORCH_INDEX", "CAUSERIE_VENV", "CAUSERIE_CHROMIUM", "CAUSERIE_DATA"),
)

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
class _About:
    """What a field's metadata holds. `name` is what people write, where that differs from the field."""

    read: Callable[[object], object]
    help: str
    name: str | None = None


def _about(read: Callable[[object], object], about: str, *, name: str | None = None) -> dict[str, _About]:
    return {"about": _About(read, about, name)}


class _Checked:
    """Validates every field at construction, so that a config in hand is a valid one."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for setting in fields(cast("type[ServeConfig]", type(self))):
            if "about" in setting.metadata:
                _checked(setting.name, setting.metadata["about"], getattr(self, setting.name), "given")


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
    about: _About

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
        about: _About = entry.metadata["about"]
        yield Setting(".".join((*parents, about.name or entry.name)), (*parents, entry.name), value, about)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """`origins` says for each key where its value came from. The API key is kept out of every representation."""

    config: ServeConfig
    origins: Mapping[str, str]
    api_key: str | None = field(default=None, repr=False)
    api_key_origin: str | None = None

    def describe(self) -> str:
        """What `--print-config` prints: TOML, each line with its origin."""
        lines = [f"# API key: {f'set ({self.api_key_origin})' if self.api_key_origin else 'not set'}"]
        table = ""
        for setting in settings():
            parent, _, name = setting.key.rpartition(".")
            if parent != table:
                table = parent
                lines += ["", f"[{parent}]"]
            value = _toml(_value_at(self.config, setting.field_path))
            line = f"# {name} is absent" if value is None else f"{name} = {value}"
            lines.append(f"{line}  # {self.origins[setting.key]}")
        return "\n".join(lines)


def load_config(
    flags: Mapping[str, str | bool],
    environ: Mapping[str, str],
    config_file: Path | None = None,
) -> LoadedConfig:
    """`flags` maps setting keys to what was given on the command line. Raises ConfigError."""
    known = {setting.key: setting for setting in settings()}
    values: dict[str, object] = {key: setting.default for key, setting in known.items()}
    origins = dict.fromkeys(known, DEFAULT_ORIGIN)
    if config_file is None and environ.get(CONFIG_VARIABLE):
        config_file = Path(environ[CONFIG_VARIABLE]).expanduser()
    for source in (_from_file(config_file, known), _from_environment(environ, known), _from_flags(flags, known)):
        for key, (raw, origin) in source.items():
            values[key] = _checked(key, known[key].about, raw, origin)
            origins[key] = origin
    config = _build({known[key].field_path: value for key, value in values.items()})
    api_key, api_key_origin = _read_api_key(config, environ)
    _refuse_open_door(config, api_key)
    _refuse_rounded_cache(config)
    _refuse_rounded_weights(config)
    return LoadedConfig(config, origins, api_key, api_key_origin)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


Found: TypeAlias = dict[str, tuple[object, str]]


def _from_file(file: Path | None, known: Mapping[str, Setting]) -> Found:
    if file is None:
        return {}
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error.strerror}; check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not TOML: {error}") from None
    found: Found = {}
    tables = {key.rpartition(".")[0] for key in known if "." in key}
    for key, raw in _flatten(document, tables, ""):
        if key not in known:
            raise ConfigError(f"{file}: unknown key {key!r}{_nearest(key, known)}")
        found[key] = (raw, str(file))
    return found


def _flatten(table: Mapping[str, object], tables: set[str], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        key = f"{prefix}{name}"
        if key in tables and isinstance(value, dict):
            yield from _flatten(cast("dict[str, object]", value), tables, f"{key}.")
        else:
            yield key, value


def _from_environment(environ: Mapping[str, str], known: Mapping[str, Setting]) -> Found:
    by_variable = {setting.variable: key for key, setting in known.items()}
    found: Found = {}
    for variable, raw in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if variable not in by_variable:
            raise ConfigError(
                f"unknown environment variable {variable}{_nearest(variable, (*by_variable, *_OTHER_VARIABLES))}"
            )
        found[by_variable[variable]] = (raw, variable)
    return found


def _from_flags(flags: Mapping[str, str | bool], known: Mapping[str, Setting]) -> Found:
    return {key: (raw, known[key].flag) for key, raw in flags.items()}


def _checked(key: str, about: _About, raw: object, origin: str) -> object:
    try:
        return about.read(raw)
    except ValueError as error:
        raise ConfigError(f"{key} must be {error}; got {raw!r} ({origin})") from None


def _build(values: Mapping[tuple[str, ...], object]) -> ServeConfig:
    """The nested record from its leaves."""

    def leaves(*parents: str) -> dict[str, Any]:
        return {path[-1]: value for path, value in values.items() if path[:-1] == parents}

    moderation = ModerationConfig(
        **leaves("moderation"),
        input=DirectionConfig(**leaves("moderation", "input")),
        output=DirectionConfig(**leaves("moderation", "output")),
    )
    return ServeConfig(**leaves(), moderation=moderation, limits=LimitsConfig(**leaves("limits")))


def _read_api_key(config: ServeConfig, environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    from_environment = environ.get(API_KEY_VARIABLE)
    if from_environment is not None and config.api_key_file is not None:
        raise ConfigError(f"{API_KEY_VARIABLE} and api_key_file are both set; keep one of them")
    if from_environment is not None:
        return _checked_key(from_environment, API_KEY_VARIABLE), API_KEY_VARIABLE
    if config.api_key_file is None:
        return None, None
    try:
        content = config.api_key_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"API key file {config.api_key_file} cannot be read: {error}") from None
    return _checked_key(content, str(config.api_key_file)), str(config.api_key_file)


def _checked_key(raw: str, origin: str) -> str:
    key = raw.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the API key in {origin} must be one line of printable ASCII without spaces, not empty")
    return key


def _refuse_open_door(config: ServeConfig, api_key: str | None) -> None:
    if api_key is None and not is_loopback(config.host):
        raise ConfigError(
            f"host {config.host} can be reached by others and no API key is set; "
            f"set {API_KEY_VARIABLE} or --api-key-file, or serve on --host 127.0.0.1"
        )


def _refuse_rounded_cache(config: ServeConfig) -> None:
    if config.exact and config.kv_cache_dtype == "int8":
        raise ConfigError(
            "exact rounds nothing and keeps keys and values in float32, which kv_cache_dtype = int8 would round; "
            "leave one of them out"
        )


def _refuse_rounded_weights(config: ServeConfig) -> None:
    if config.load_in is not None and config.exact:
        raise ConfigError(
            f"exact rounds nothing, and load_in = {config.load_in} rounds the weights; leave one of them out"
        )
    if config.load_in is not None and config.min_top1_agreement is not None:
        raise ConfigError(
            f"load_in = {config.load_in} rounds weights that no report has measured, so min_top1_agreement = "
            f"{config.min_top1_agreement:g} cannot be checked; leave one of them out"
        )


def _nearest(name: str, known: Mapping[str, Setting] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; `causerie serve --print-config` lists all keys"


def _value_at(record: object, field_path: tuple[str, ...]) -> object:
    for name in field_path:
        record = getattr(record, name)
    return record


def _toml(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, object]", value).items()
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(one)}" for name, one in pairs) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(str(_toml(part)) for part in cast("tuple[object, ...]", value)) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
