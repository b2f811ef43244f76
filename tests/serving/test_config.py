from __future__ import annotations

import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from serving.config import ConfigError, DirectionConfig, ServeConfig, settings
from serving.config_sources import LoadedConfig, load_config

pytestmark = pytest.mark.unit


def write(directory: Path, text: str) -> Path:
    file = directory / "causerie.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, 'port = 1\nmodel = "file"\nexact = true\n[limits]\nmax_stop = 1\n')
    environ = {"CAUSERIE_PORT": "2", "CAUSERIE_MODEL": "environment"}
    loaded = load_config({"port": "3"}, environ, file)
    config = loaded.config
    assert (config.port, config.model, config.exact, config.host) == (3, "environment", True, "127.0.0.1")
    assert config.limits.max_stop == 1
    assert loaded.origins["port"] == "--port"
    assert loaded.origins["model"] == "CAUSERIE_MODEL"
    assert loaded.origins["limits.max_stop"] == str(file)
    assert loaded.origins["host"] == "default"


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 77\n")
    assert load_config({}, {"CAUSERIE_CONFIG": str(file)}).config.port == 77


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("prot = 1", "'prot'; did you mean 'port'?"),
        ("[limits]\nmax_wating = 1", "'limits.max_wating'; did you mean 'limits.max_waiting'?"),
        ("max_waiting = 1", "'max_waiting'; did you mean 'limits.max_waiting'?"),
        ("[moderation]\nenabled = false", "'moderation.enabled'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path, text: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config({}, {}, write(tmp_path, text))
    assert nearest in str(refused.value)


def test_an_unknown_variable_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="CAUSERIE_HOTS; did you mean 'CAUSERIE_HOST'"):
        load_config({}, {"CAUSERIE_HOTS": "::1"})


def test_variables_of_others_are_left_alone() -> None:
    load_config({}, {"CAUSERIE_CACHE": "/x", "CAUSERIE_TORCH_INDEX": "y", "PATH": "z"})


@pytest.mark.parametrize(
    ("key", "raw", "allowed"),
    [
        ("port", "99999", "a whole number from 0 to 65,535"),
        ("port", "http", "a whole number"),
        ("kv_memory", "lots", "such as 512MiB"),
        ("kv_memory", "12KiB", "at least 1,048,576 bytes"),
        ("exact", "maybe", "true or false"),
        ("moderation.threshold", "1", "between 0 and 1"),
        ("moderation.threshold", "nan", "between 0 and 1"),
        ("moderation.on_flagged", "ignore", "one of error, refuse"),
        ("moderation.output.mode", "on", "one of off, log, block"),
        ("moderation.input.preset", "harsh", "one of strict, balanced, lenient, none"),
        ("moderation.input.fail", "shut", "one of closed, open"),
        ("moderation.input.thresholds", "hate", "name=number texts separated by commas"),
        ("moderation.input.thresholds", "hate=0.5,hate=0.6", "name=number texts separated by commas"),
        ("moderation.input.thresholds", "hatred=0.5", "numbers by names out of harassment, "),
        ("moderation.input.thresholds", "hate=1", "by every name a number between 0 and 1"),
        ("moderation.input.thresholds", "hate=", "by every name a number between 0 and 1"),
        ("moderation.message", " ", "a text that is not empty"),
        ("limits.max_waiting", "0", "a whole number from 1 up"),
        ("model", " ", "a text that is not empty"),
        ("log_format", "xml", "one of text, json"),
        ("load_in", "int4", "one of nf4, int8"),
        ("min_top1_agreement", "95", "a share from 0 to 1, or a percentage such as 95%"),
        ("min_top1_agreement", "101%", "a percentage such as 95%"),
        ("min_top1_agreement", "nan%", "a percentage such as 95%"),
    ],
)
def test_a_bad_value_is_refused_with_what_was_given_and_what_is_allowed(key: str, raw: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config({key: raw}, {})
    message = str(refused.value)
    assert message.startswith(f"{key} must be ")
    assert allowed in message
    assert repr(raw) in message
    assert "--" in message


def test_each_direction_of_moderation_is_a_table_of_its_own(tmp_path: Path) -> None:
    text = """
[moderation]
threshold = 0.6
[moderation.input]
mode = "log"
thresholds = { "violence/graphic" = 0.7 }
[moderation.output]
preset = "strict"
fail = "open"
"""
    environ = {"CAUSERIE_MODERATION_OUTPUT_THRESHOLDS": "hate=0.5, jailbreak = .25"}
    moderation = load_config({"moderation.output.mode": "off"}, environ, write(tmp_path, text)).config.moderation

    assert moderation.input == DirectionConfig(mode="log", thresholds={"violence/graphic": 0.7})
    thresholds = {"hate": 0.5, "jailbreak": 0.25}
    assert moderation.output == DirectionConfig(mode="off", preset="strict", thresholds=thresholds, fail="open")
    assert (moderation.threshold, moderation.on_flagged, moderation.record_text) == (0.6, "error", False)


def test_both_directions_block_and_fail_closed_by_default() -> None:
    moderation = load_config({}, {}).config.moderation
    assert moderation.input == moderation.output == DirectionConfig(mode="block", preset="balanced", fail="closed")


def test_a_config_made_in_code_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="port must be"):
        ServeConfig(port=-1)


@pytest.mark.parametrize(
    ("raw", "expected"), [("512MiB", 512 << 20), ("2 GiB", 2 << 30), ("1.5gb", 1_500_000_000), ("4194304", 4 << 20)]
)
def test_sizes_have_units(raw: str, expected: int) -> None:
    assert load_config({"kv_memory": raw}, {}).config.kv_memory_bytes == expected


def test_lists_are_toml_lists_or_commas(tmp_path: Path) -> None:
    from_file = load_config({}, {}, write(tmp_path, 'allowed_hosts = ["a", "b"]'))
    from_flag = load_config({"allowed_hosts": "a, b"}, {})
    assert from_file.config.allowed_hosts == from_flag.config.allowed_hosts == ("a", "b")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "chat.example.org"])
def test_a_host_others_can_reach_needs_a_key(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no API key is set; set CAUSERIE_API_KEY or --api-key-file"):
        load_config({"host": host}, {})
    assert load_config({"host": host}, {"CAUSERIE_API_KEY": "k"}).api_key == "k"
    key_file = tmp_path / "key"
    key_file.write_text("from-file\n", encoding="utf-8")
    assert load_config({"host": host, "api_key_file": str(key_file)}, {}).api_key == "from-file"


@pytest.mark.parametrize("raw", ["0.95", "95%", " 95 % "])
def test_a_share_is_a_number_or_a_percentage(raw: str) -> None:
    assert load_config({"min_top1_agreement": raw}, {}).config.min_top1_agreement == pytest.approx(0.95)


def test_weights_rounded_while_loading_fit_neither_exact_nor_a_limit() -> None:
    with pytest.raises(ConfigError, match="load_in = nf4 rounds the weights; leave one of them out"):
        load_config({"load_in": "nf4", "exact": True}, {})
    with pytest.raises(ConfigError, match=r"min_top1_agreement = 0\.9 cannot be checked"):
        load_config({"load_in": "int8"}, {"CAUSERIE_MIN_TOP1_AGREEMENT": "90%"})


def test_an_exact_server_refuses_a_rounded_cache() -> None:
    assert load_config({"kv_cache_dtype": "int8"}, {}).config.kv_cache_dtype == "int8"
    assert load_config({"kv_cache_dtype": "bfloat16", "exact": True}, {}).config.exact
    with pytest.raises(ConfigError, match=r"exact rounds nothing .* kv_cache_dtype = int8"):
        load_config({"exact": True}, {"CAUSERIE_KV_CACHE_DTYPE": "int8"})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_a_loopback_host_needs_none(host: str) -> None:
    assert load_config({"host": host}, {}).api_key is None


@pytest.mark.parametrize("key", ["", "  ", "two words", "schlüssel", "a\nb"])
def test_an_unusable_key_stops_the_start(key: str) -> None:
    with pytest.raises(ConfigError, match="the API key in CAUSERIE_API_KEY must be"):
        load_config({}, {"CAUSERIE_API_KEY": key})


def test_two_keys_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both set"):
        load_config({"api_key_file": str(tmp_path / "key")}, {"CAUSERIE_API_KEY": "k"})


def test_the_key_is_never_shown() -> None:
    loaded = load_config({}, {"CAUSERIE_API_KEY": "do-not-print"})
    assert "do-not-print" not in repr(loaded) + loaded.describe()
    assert "API key: set (CAUSERIE_API_KEY)" in loaded.describe()


def test_what_is_printed_is_a_file_that_gives_the_same_config(tmp_path: Path) -> None:
    loaded = load_config(
        {"kv_memory": "1GiB", "allowed_hosts": "a,b", "exact": True, "moderation.threshold": "0.5"},
        {"CAUSERIE_LIMITS_MAX_STOP": "2", "CAUSERIE_LOG_FORMAT": "json"},
    )
    again = load_config({}, {}, write(tmp_path, loaded.describe()))
    assert again.config == loaded.config
    assert "port = 8000  # default" in loaded.describe()
    assert "max_stop = 2  # CAUSERIE_LIMITS_MAX_STOP" in loaded.describe()


def test_every_field_is_a_documented_setting() -> None:
    def count(record: object) -> int:
        assert is_dataclass(record)
        values = [getattr(record, entry.name) for entry in fields(record)]
        return sum(count(value) if is_dataclass(value) else 1 for value in values)

    every = list(settings())
    assert len(every) == count(ServeConfig())
    assert all(setting.help for setting in every)
    assert len({setting.flag for setting in every}) == len({setting.variable for setting in every}) == len(every)
    assert tomllib.loads(LoadedConfig(ServeConfig(), {s.key: "default" for s in every}).describe())


@pytest.mark.parametrize("content", [None, "port = ", "\udcff"])
def test_a_file_that_cannot_be_read_says_so(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="configuration file"):
        load_config({}, {}, file)
