"""Who imports whom, read from the source with `ast`: the edges that docs/architecture.md draws, and its exceptions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moderation", "quant", "serving", "training", "ui")
MAY_IMPORT: dict[str, set[str]] = {
    "quant": set(),
    "moderation": {"quant"},
    "serving": {"quant", "moderation"},
    "training": {"quant", "moderation", "serving"},
    "ui": set(),
}
# Inside serving, from the bottom up. A module outside these folders is base, unless it is listed here.
SERVING_LAYERS = ("base", "model", "engine", "gateway", "composition")
LAYER_OF_MODULE = {
    "serving.metrics": "gateway",
    "serving.model_sources": "composition",
    "serving.preparation": "composition",
    "serving.preparation_child": "composition",
    "serving.served_model": "composition",
    "serving.serve": "composition",
    "serving.commands": "composition",
    "serving.cli": "composition",
}
# Inside quant, from the bottom up. What lies outside these folders serves them all, and is not held to an order.
QUANT_LAYERS = ("method", "formats", "walk", "report", "budget", "run")
# The composition root mounts the page; a package's commands.py and commands_*.py may reach anywhere, inside functions.
PAGE_MOUNTED_BY = "serving.serve"


@dataclass(frozen=True, slots=True)
class Import:
    module: str
    imported: str
    line: int
    is_inside_function: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.imported}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, module: str) -> Iterator[Import]:
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from serving import engine` and `from serving.engine import x` both name what is reached.
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(module, name, node.lineno, id(node) in inside) for name in names)


@cache
def all_imports() -> list[Import]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [found for path in files for found in imports_of(path.read_text(encoding="utf-8"), module_name(path))]


def is_ours(found: Import) -> bool:
    return found.imported.split(".")[0] in PACKAGES


def is_commands(module: str) -> bool:
    return module.rpartition(".")[2].split("_")[0] == "commands"


def is_excepted(found: Import) -> bool:
    if is_commands(found.module):
        return found.is_inside_function
    return found.module == PAGE_MOUNTED_BY and found.imported.startswith("ui.")


def crosses_packages_wrongly(found: Import) -> bool:
    package, target = found.module.split(".")[0], found.imported.split(".")[0]
    return target != package and target not in MAY_IMPORT[package] and not is_excepted(found)


def serving_layer(name: str) -> int:
    parts = name.split(".")
    if len(parts) > 1 and parts[1] in SERVING_LAYERS:
        return SERVING_LAYERS.index(parts[1])
    return SERVING_LAYERS.index(LAYER_OF_MODULE.get(".".join(parts[:2]), "base"))


def climbs_in_serving(found: Import) -> bool:
    both_serving = found.module.startswith("serving.") and found.imported.startswith("serving.")
    return both_serving and serving_layer(found.imported) > serving_layer(found.module)


def quant_layer(name: str) -> int | None:
    parts = name.split(".")
    return QUANT_LAYERS.index(parts[1]) if parts[0] == "quant" and parts[1:2] and parts[1] in QUANT_LAYERS else None


def climbs_in_quant(found: Import) -> bool:
    above, below = quant_layer(found.imported), quant_layer(found.module)
    return above is not None and below is not None and above > below


def test_packages_import_only_what_lies_below_them() -> None:
    assert [str(found) for found in all_imports() if is_ours(found) and crosses_packages_wrongly(found)] == []


def test_serving_imports_from_base_to_composition_only() -> None:
    assert [str(found) for found in all_imports() if climbs_in_serving(found)] == []


def test_quant_imports_from_method_to_run_only() -> None:
    assert [str(found) for found in all_imports() if climbs_in_quant(found)] == []


def test_engine_and_model_know_no_moderation() -> None:
    below = ("serving.model", "serving.engine")
    found = [str(edge) for edge in all_imports() if edge.module.startswith(below) and "moderation" in edge.imported]
    assert found == []


def test_imports_are_absolute() -> None:
    assert [str(found) for found in all_imports() if found.imported.startswith(".")] == []


def test_commands_reach_other_packages_only_when_called() -> None:
    commands = [found for found in all_imports() if is_commands(found.module) and is_ours(found)]
    upwards = [found for found in commands if crosses_packages_wrongly(found)]
    assert [str(found) for found in upwards] == []


def test_what_is_tested_here_is_every_package_of_the_distribution() -> None:
    with_init = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert with_init == set(PACKAGES)


def test_no_module_of_the_product_executes_pickles_or_remote_code() -> None:
    """Only safetensors are read for weights, and no checkpoint brings code along."""
    sources = {
        path: path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    forbidden = ("torch.load(", "pickle.load", "trust_remote_code=True", "joblib.load", "torch.save(")
    assert [(path.name, word) for path, text in sources.items() for word in forbidden if word in text] == []


@pytest.mark.parametrize(
    ("module", "source", "is_refused"),
    [
        ("quant.method.matrix", "from serving.model import weights", True),
        ("quant.commands", "from serving.model import weights", True),
        ("quant.commands", "def run():\n    from serving.model import weights", False),
        ("quant.commands_export", "from serving.model import weights", True),
        ("quant.commands_export", "def run():\n    from serving.model import weights", False),
        ("moderation.policy", "import serving.engine", True),
        ("moderation.policy", "from quant.errors import CheckpointError", False),
        ("serving.serve", "from ui.app import mount_page", False),
        ("serving.gateway.app", "from ui.app import mount_page", True),
        ("ui.client", "def f():\n    import serving.errors", True),
        ("serving.engine.engine", "from serving.gateway import ports", True),
        ("serving.engine.engine", "from serving import gateway", True),
        ("serving.gateway.chat", "from serving.engine.requests import GenerateRequest", False),
        ("serving.errors", "from serving.model.spec import DecoderSpec", True),
        ("serving.model.weights", "from serving.serve import main", True),
    ],
)
def test_each_rule_refuses_what_it_should(module: str, source: str, is_refused: bool) -> None:
    found = list(imports_of(source, module))
    assert any(crosses_packages_wrongly(edge) or climbs_in_serving(edge) for edge in found) is is_refused
