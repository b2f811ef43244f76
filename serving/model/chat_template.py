"""A checkpoint's chat template: where it is stored, and a sandboxed environment that renders it as transformers does.

A template is code from whoever published the checkpoint: it runs in jinja2's immutable sandbox, on plain values only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from quant.errors import CheckpointError
from serving.model.json_files import read_optional_object

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def find_template(directory: Path) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's template (of several, the one named default), else None."""
    path = directory / TEMPLATE_FILE
    if path.exists():
        return path.read_text(encoding="utf-8")
    path = directory / TOKENIZER_CONFIG_FILE
    template = read_optional_object(path).get("chat_template")
    if isinstance(template, list):
        named = {str(entry["name"]): entry["template"] for entry in cast("list[Mapping[str, object]]", template)}
        if "default" not in named:
            found = ", ".join(named) or "none"
            raise CheckpointError(f"{path}: of several chat templates one must be named default; found {found}")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template must be a string or a list of named ones")
    return template


def compile_template(source: str, *, now: Callable[[], datetime]) -> jinja2.Template:
    """Raises CheckpointError if the template is not valid Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json

    def strftime_now(form: str) -> str:
        return now().strftime(form)

    functions = {"raise_exception": _raise_exception, "strftime_now": strftime_now, "namespace": _PlainNamespace}
    cast("dict[str, object]", environment.globals).update(functions)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is not valid: line {error.lineno}: {error.message}") from error


def string_constants(source: str) -> frozenset[str]:
    """Every string written in the template's expressions: what it may look for in a message."""
    tree = ImmutableSandboxedEnvironment(extensions=[_GenerationTag, loopcontrols]).parse(source)
    return frozenset(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; our loss mask finds that by itself, so the body stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PlainNamespace(Namespace):
    """A namespace without underscore names, which could reach into the object that holds the values."""

    def __init__(*args: Any, **values: Any) -> None:
        # `self` is args[0]: a template may have a value of that name.
        for name in dict(*args[1:], **values):
            _check_name(name)
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter it leaves <, > and & as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
