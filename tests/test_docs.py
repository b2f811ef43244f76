"""The documents say what is true: settings, models, commands, paths and links that they name exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from serving.cli import COMMANDS
from serving.config import Setting, settings
from serving.config_sources import load_config
from serving.models import DEFAULT_MODEL, NAMED_MODELS, NamedModel

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
SETTINGS_MARK = re.compile(r"<!-- settings:.*?-->\n(.*?)<!-- end of settings -->", re.DOTALL)
# Written by an installation or a run, so not in a checkout.
MADE_LATER = {
    "causerie.json",
    "causerie.toml",
    "config.json",
    "quantize_config.json",
    "quantization_report.md",
    "reward_report.md",
}


def settings_table() -> str:
    head = "| setting | default | flag, variable | meaning |\n|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(_cells(setting))} |\n" for setting in settings())


def _cells(setting: Setting) -> tuple[str, ...]:
    default = "" if setting.default in (None, ()) else f"`{_spelled(setting)}`"
    return f"`{setting.key}`", default, f"`{setting.flag}`, `{setting.variable}`", setting.help.replace("|", "\\|")


def _spelled(setting: Setting) -> str:
    return setting.shown_default.lower() if setting.is_switch else setting.shown_default


def model_row(model: NamedModel) -> str:
    sizes = f"{model.download_bytes / 1e9:.1f} GB | {model.memory_bytes / 1e9:.1f} GB"
    return f"| `{model.name}` | {model.parameters / 1e9:.2g} B | {sizes} |"


def test_every_setting_is_documented_as_it_is() -> None:
    found = SETTINGS_MARK.search((ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"))
    assert found is not None
    assert found[1] == settings_table(), f"the table should be:\n\n{settings_table()}"


def test_every_variable_of_ours_that_is_read_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    sources = [path for folder in ("serving", "moderation", "quant", "ui", "scripts") for path in _python(folder)]
    read = {name for path in sources for name in re.findall(r"\bCAUSERIE_[A-Z_]+[A-Z]\b", path.read_text("utf-8"))}
    assert sorted(name for name in read if f"`{name}`" not in text) == []


def test_variables_of_other_programs_do_not_stop_the_server() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(CAUSERIE_\w+)` \|", text, re.MULTILINE)) - {"CAUSERIE_CONFIG"}
    assert len(documented) >= 6
    load_config({}, dict.fromkeys(documented, "value"))


def _python(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_readme_is_short_and_opens_with_the_two_commands() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    opening = "\n".join(lines[:12])
    assert "scripts/serve" in opening
    assert "scripts/test" in opening


def test_readme_lists_named_models_with_the_registrys_figures() -> None:
    rows = re.findall(r"^\| `.*$", README, re.MULTILINE)
    listed = [row for row in rows if re.match(r"\| `[\w.-]+` \| [\d.]+ B", row)]
    known = {model_row(model): model for model in NAMED_MODELS}
    assert [row for row in listed if not any(row.startswith(prefix) for prefix in known)] == [], "\n".join(known)
    sizes = [model.parameters for prefix, model in known.items() if any(row.startswith(prefix) for row in listed)]
    assert min(sizes) < 1e9
    assert max(sizes) > 7e9


def test_readme_names_the_default_model() -> None:
    assert f"`{DEFAULT_MODEL}`" in README


def test_readmes_client_example_is_six_lines_that_compile() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 6
    ast.parse(example)


def test_readmes_tree_shows_every_folder_of_the_root() -> None:
    ignored = {"dist", "build", "pipeline-tiny"}  # made by an installation or a run
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and path.name not in ignored and not path.name.startswith((".", "_")) and any(path.iterdir())
    }
    assert sorted(name for name in folders if f"    {name}/" not in README and not name.endswith(".egg-info")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`|`([\w-]+\.(?:py|md|toml|json|css))`", text)
    named = {path or name for path, name in paths} - MADE_LATER
    ours = {path.split("/")[0] for path in map(str, (entry.relative_to(ROOT) for entry in ROOT.iterdir()))}
    in_tree = [path for path in named if path.split("/")[0] in ours]
    bare = [path for path in named if "/" not in path and path not in in_tree]
    assert sorted(path for path in in_tree if not (ROOT / path).exists()) == []
    assert sorted(name for name in bare if not any(ROOT.glob(f"*/**/{name}"))) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    spoken = re.findall(r"(?:`|^    |\$ )causerie ((?:[a-z]+ ?){1,2})", text, re.MULTILINE)
    unknown = [words for words in spoken if not _is_command(words.split())]
    assert unknown == []


def _is_command(words: list[str]) -> bool:
    return any(" ".join(words[:count]) in COMMANDS for count in (1, 2))


def test_changelog_has_unreleased_on_top() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_data_and_weights_that_ship_say_their_licence() -> None:
    for card in ("quant/data/README.md", "moderation/weights/README.md"):
        assert "licence" in (ROOT / card).read_text(encoding="utf-8").lower(), card


def test_every_source_of_shipped_text_is_in_its_card() -> None:
    card = (ROOT / "quant" / "data" / "README.md").read_text(encoding="utf-8")
    lines = [
        line for path in (ROOT / "quant" / "data").glob("*.jsonl") for line in path.read_text("utf-8").splitlines()
    ]
    sources = {json.loads(line)["source"] for line in lines}
    assert sources
    assert sorted(source for source in sources if f"`{source}`" not in card) == []
