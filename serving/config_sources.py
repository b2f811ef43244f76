"""What `causerie serve` is told by its TOML file, its CAUSERIE_* variables and its flags, as one checked `ServeConfig`.

The only file that reads the environment. A key it does not know is refused with the nearest one it does. The API key is
not a setting: it comes from CAUSERIE_API_KEY or the key file, and is never printed.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from serving.config import (
    API_KEY_VARIABLE,
    ENV_PREFIX,
    DirectionConfig,
    LimitsConfig,
    ModerationConfig,
    ServeConfig,
    Setting,
    checked_value,
    settings,
)
from serving.errors import ConfigError

CONFIG_VARIABLE = "CAUSERIE_CONFIG"
# The origin of a setting that nobody gave.
DEFAULT_ORIGIN = "default"
# Read elsewhere (by the cache and the start script), so not unknown here.
_OTHER_VARIABLES = (
    *(API_KEY_VARIABLE, CONFIG_VARIABLE, "CAUSERIE_CACHE"),
    *("CAUSERIE_TORCH_INDEX", "CAUSERIE_VENV", "CAUSERIE_CHROMIUM", "CAUSERIE_DATA"),
)


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
            values[key] = checked_value(key, known[key].about, raw, origin)
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
