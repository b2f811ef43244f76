"""From a recipe's table and command-line flags to a stage's frozen settings: default < recipe < flag.

A setting is a dataclass field made by `option`. Keys that do not exist are refused with the nearest one that does, and
so is a flag that would have no effect beside the others (`applies`).
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from quant.model_directory import JsonValue
from training.errors import TrainingError

Settings = TypeVar("Settings")
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class Applies:
    """The option has an effect only while the option `name` has one of `values`."""

    name: str
    values: tuple[object, ...]

    def __str__(self) -> str:
        return f"{flag_of(self.name)} {' or '.join(str(value) for value in self.values)}"


@dataclass(frozen=True, slots=True)
class About:
    """What the metadata of a settings field holds. minimum and maximum are inclusive; above is exclusive."""

    help: str
    applies: Applies | None
    minimum: float | None
    maximum: float | None
    above: float | None


def option(
    default: Any,
    help: str,
    *,
    applies: tuple[str, tuple[object, ...]] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """A settings field. default: `...` makes it required. applies: (other option, its values) for it to matter."""
    about = About(help, Applies(*applies) if applies else None, minimum, maximum, above)
    return field(default=MISSING if default is ... else default, metadata={"about": about})


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_settings(
    kind: type[Settings], stage: str, argv: Sequence[str], *, description: str, examples: str = ""
) -> Settings:
    """The settings of one run. Raises TrainingError for a recipe, SystemExit(2) for flags that argparse refuses."""
    parser = _parser(kind, stage, description, examples)
    arguments = vars(parser.parse_args(argv))
    recipe = arguments.pop("recipe")
    from_recipe = read_recipe(recipe, stage.split()[-1], kind) if recipe is not None else {}
    given = {name: value for name, value in arguments.items() if value is not None}
    return build_settings(kind, {**from_recipe, **given}, given=tuple(given))


def build_settings(kind: type[Settings], values: Mapping[str, object], *, given: Sequence[str] = ()) -> Settings:
    """Check and convert `values`. given: names that were asked for by hand, which must therefore have an effect."""
    hints = get_type_hints(kind)
    names = tuple(spec.name for spec in fields(cast("Any", kind)))
    _refuse_unknown(values, names, "option")
    missing = [spec.name for spec in fields(cast("Any", kind)) if spec.default is MISSING and spec.name not in values]
    if missing:
        raise TrainingError(f"missing {', '.join(flag_of(name) for name in missing)}")
    converted = {name: convert(hints[name], value, name) for name, value in values.items()}
    for spec in fields(cast("Any", kind)):
        if spec.name in converted:
            _check_range(spec.name, converted[spec.name], _about(spec))
    settings = kind(**converted)
    _refuse_without_effect(settings, given)
    return settings


def read_recipe(recipe: str, stage: str, kind: type[object]) -> Mapping[str, object]:
    """The table [stage] of a recipe: a path, or the name of a bundled one."""
    path = Path(recipe) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise TrainingError(f"recipe {recipe!r} is neither a .toml file nor one of: {known}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{path} is not valid TOML: {error}") from error
    table = tables.get(stage)
    if not isinstance(table, dict):
        raise TrainingError(f"{path} has no table [{stage}]; it has: {', '.join(tables)}")
    values = {str(key).replace("-", "_"): value for key, value in cast("dict[object, object]", table).items()}
    _refuse_unknown(values, tuple(spec.name for spec in fields(cast("Any", kind))), f"key of [{stage}] in {path.name}")
    return values


def record_of(settings: object) -> dict[str, JsonValue]:
    """For the manifest. Paths are cut to their names: a manifest does not know where it lies."""
    record: dict[str, JsonValue] = {}
    for spec in fields(cast("Any", settings)):
        value = getattr(settings, spec.name)
        if isinstance(value, Path):
            value = value.name
        elif isinstance(value, tuple):
            value = [item.name if isinstance(item, Path) else item for item in cast("tuple[Any, ...]", value)]
        record[spec.name] = value
    return record


def convert(kind: Any, value: object, name: str) -> object:
    """`value` (from TOML or a flag) as `kind`: bool, int, float, str, Path, Literal, a tuple of one, or X | None."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return convert(inner, value, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TrainingError(f"{name} must be a list; found {value!r}")
        return tuple(convert(arguments[0], item, name) for item in cast("Sequence[object]", value))
    if origin is Literal:
        if value not in arguments:
            raise TrainingError(f"{name} must be {' or '.join(map(repr, arguments))}; found {value!r}")
        return value
    return _convert_plain(kind, value, name)


def _convert_plain(kind: type[object], value: object, name: str) -> object:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, bool):
        raise TrainingError(f"{name} must be a whole number; found {value!r}")
    if isinstance(value, kind):
        return value
    words: Mapping[object, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
    }
    raise TrainingError(f"{name} must be {words[kind]}; found {value!r}")


def _refuse_unknown(values: Mapping[str, object], known: Sequence[str], what: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are: {', '.join(known)}"
            raise TrainingError(f"{name!r} is no {what}{hint}")


def _refuse_without_effect(settings: object, given: Sequence[str]) -> None:
    for spec in fields(cast("Any", settings)):
        applies = _about(spec).applies
        if spec.name in given and applies is not None and getattr(settings, applies.name) not in applies.values:
            found = getattr(settings, applies.name)
            raise TrainingError(
                f"{flag_of(spec.name)} has no effect with {flag_of(applies.name)} {found}; it needs {applies}"
            )


def _check_range(name: str, value: object, about: About) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if about.minimum is not None and value < about.minimum:
        raise TrainingError(f"{name} must be at least {about.minimum:g}; found {value:g}")
    if about.maximum is not None and value > about.maximum:
        raise TrainingError(f"{name} must be at most {about.maximum:g}; found {value:g}")
    if about.above is not None and value <= about.above:
        raise TrainingError(f"{name} must be above {about.above:g}; found {value:g}")


def _about(spec: Any) -> About:
    return cast("About", spec.metadata["about"])


def _parser(kind: type[object], stage: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"causerie {stage}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="R", help="a .toml file, or a bundled one: tiny, 135m, 7b, 13b")
    hints = get_type_hints(kind)
    specs = {spec.name: spec for spec in fields(cast("Any", kind))}
    # The stage's own options first, then what it shares with others, each under its class's first sentence.
    for owner in kind.__mro__:
        names = [name for name in inspect.get_annotations(owner) if name in specs]
        group = parser.add_argument_group((owner.__doc__ or owner.__name__).split("\n")[0]) if names else None
        for name in names:
            spec = specs.pop(name)
            assert group is not None
            group.add_argument(flag_of(name), dest=name, default=None, **_argument(hints[name], spec))
    return parser


def _argument(kind: Any, spec: Any) -> dict[str, Any]:
    """What argparse needs to know about one field."""
    about = _about(spec)
    notes = [] if spec.default is MISSING else [f"default: {_shown(spec.default)}"]
    if about.applies is not None:
        notes.append(f"with {about.applies}")
    text = about.help.replace("%", "%%") + (f" ({'; '.join(notes)})" if notes else " (required)")
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        origin, arguments = get_origin(kind), get_args(kind)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if origin is Literal:
        return {"choices": arguments, "help": text}
    if origin is tuple:
        return {"nargs": "+", "type": arguments[0], "metavar": _metavar(arguments[0]), "help": text}
    return {"type": kind, "metavar": _metavar(kind), "help": text}


def _metavar(kind: type[object]) -> str:
    names: Mapping[object, str] = {int: "N", float: "X", Path: "PATH"}
    return names.get(kind, "NAME")


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, cast("tuple[object, ...]", default))) or "none"
    return "none" if default is None else str(default)
