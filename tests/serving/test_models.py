from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from quant.model_directory import Manifest, write_manifest
from serving import models
from serving.commands import models_list
from serving.models import (
    DEFAULT_MODEL,
    NAMED_MODELS,
    RELEASED_MODEL,
    QuantizationRecipe,
    cache_directory,
    is_quantized,
    model_folder,
    model_state,
    prepared_directory,
    resolve,
)
from serving.preparation_child import find_prepared
from serving.served_model import model_id_of

pytestmark = pytest.mark.unit


def write_model(directory: Path, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def test_cache_directory_prefers_our_variable_then_xdg_then_home(tmp_path: Path) -> None:
    ours, xdg = str(tmp_path / "ours"), str(tmp_path / "xdg")
    assert cache_directory({"CAUSERIE_CACHE": ours, "XDG_CACHE_HOME": xdg}) == tmp_path / "ours"
    assert cache_directory({"XDG_CACHE_HOME": xdg}) == tmp_path / "xdg" / "causerie"
    assert cache_directory({"CAUSERIE_CACHE": ""}) == Path.home() / ".cache" / "causerie"


def test_model_is_a_name_then_a_directory_then_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "owner" / "local")
    assert resolve("SmolLM2-135M-Instruct").hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve("owner/local").directory == tmp_path / "owner" / "local"
    assert resolve("owner/elsewhere@v1.2").hub_id == "owner/elsewhere"
    assert resolve("owner/elsewhere@v1.2").revision == "v1.2"


def test_gguf_file_is_a_model_and_so_is_a_directory_of_one(tmp_path: Path) -> None:
    directory = tmp_path / "Tiny"
    directory.mkdir()
    file = directory / "Tiny-Q4_0.gguf"
    file.write_bytes(b"GGUF")
    for given in (file, directory):
        assert resolve(str(given)).gguf == file
        assert resolve(str(given)).directory is None
    assert model_id_of(str(file)) == "tiny-q4-0"
    (directory / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="holds 2 GGUF files"):
        resolve(str(directory))
    (directory / "config.json").write_text("{}")
    assert resolve(str(directory)).directory == directory


def test_file_that_is_no_gguf_file_is_refused_with_what_to_give(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the directory"):
        resolve(str(path))


def test_folder_of_a_gguf_file_follows_its_content(tmp_path: Path) -> None:
    file, copy, other = (tmp_path / name / "m.gguf" for name in ("a", "b", "c"))
    for path, content in ((file, b"GGUF1"), (copy, b"GGUF1"), (other, b"GGUF2")):
        path.parent.mkdir()
        path.write_bytes(content)
    folders = [model_folder(tmp_path / "cache", resolve(str(path))) for path in (file, copy, other)]
    assert folders[0] == folders[1] != folders[2]


def test_hub_id_of_a_named_model_is_that_model() -> None:
    assert resolve("huggingfacetb/SmolLM2-135M-instruct").package is not None


@pytest.mark.parametrize("model", ["smollm2-135m-instuct", "./absent", "/absent/model", "a/b/c", ""])
def test_what_cannot_be_a_model_is_refused_with_what_can(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a known name, nor an existing directory, nor a GGUF file, nor"):
        resolve(model)


def test_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="did you mean 'smollm2-135m-instruct'"):
        resolve("smollm2-135m-instuct")


def test_folder_of_a_directory_follows_its_content_and_not_its_place(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = model_folder(cache, resolve(str(write_model(tmp_path / "a" / "model"))))
    same = model_folder(cache, resolve(str(write_model(tmp_path / "b" / "model"))))
    other = model_folder(cache, resolve(str(write_model(tmp_path / "c" / "model", b"others!"))))
    assert first == same != other


def test_changed_weights_of_the_same_size_get_another_folder(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    before = model_folder(tmp_path / "cache", resolve(str(directory)))
    (directory / "model.safetensors").write_bytes(b"weightz")
    assert model_folder(tmp_path / "cache", resolve(str(directory))) != before


def test_other_options_and_revisions_are_prepared_beside_each_other(tmp_path: Path) -> None:
    reference = resolve(DEFAULT_MODEL)
    places = {
        prepared_directory(tmp_path, reference),
        prepared_directory(tmp_path, replace(reference, revision="v2")),
        prepared_directory(tmp_path, replace(reference, quantization=QuantizationRecipe(bits=8))),
    }
    assert len(places) == 3


def test_state_tells_prepared_from_downloaded_from_nothing(tmp_path: Path) -> None:
    reference = resolve(DEFAULT_MODEL)
    folder = model_folder(tmp_path, reference)
    assert model_state(tmp_path, reference) == "not downloaded"
    write_manifest(write_model(folder / "source"), Manifest(stage="source"))
    assert model_state(tmp_path, reference) == "downloaded"
    write_manifest(write_model(prepared_directory(folder, reference)), Manifest(stage="quantize"))
    assert model_state(tmp_path, reference) == "prepared"


def test_quantised_directory_is_told_by_its_config(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    assert not is_quantized(directory)
    (directory / "config.json").write_text('{"quantization_config": {}}')
    assert is_quantized(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        is_quantized(directory)


def test_names_are_unique_and_written_as_they_are_looked_up() -> None:
    names = [model.name for model in NAMED_MODELS]
    assert len(set(names)) == len(names)
    fetched = [model for model in NAMED_MODELS if model.hub_id is not None]
    assert all(resolve(model.name).slug == model.name for model in fetched)


def test_released_model_is_found_beside_the_packages_and_nothing_is_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path / "release" / RELEASED_MODEL)
    (directory / "config.json").write_text('{"quantization_config": {}}')
    write_manifest(directory, Manifest(stage="quantize"))
    monkeypatch.setattr(models, "RELEASE_FOLDER", tmp_path / "release")
    assert find_prepared(RELEASED_MODEL) == directory
    assert model_id_of(RELEASED_MODEL) == RELEASED_MODEL
    assert model_state(tmp_path / "cache", models.resolve(RELEASED_MODEL)) == "included"
    assert not (tmp_path / "cache").exists()


def test_released_model_that_an_installation_lacks_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "RELEASE_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=f"has no {tmp_path / RELEASED_MODEL}; install it again"):
        resolve(RELEASED_MODEL)
    (named,) = (model for model in NAMED_MODELS if model.name == RELEASED_MODEL)
    assert model_state(tmp_path, named.reference()) == "missing"


def test_release_folder_is_the_one_of_this_source_tree() -> None:
    assert Path(__file__).parents[2] / "training" / "release" == models.RELEASE_FOLDER


def test_list_shows_sizes_and_state_for_people_and_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAUSERIE_CACHE", str(tmp_path))
    assert models_list([]) == 0
    table = capsys.readouterr().out
    assert all(model.name in table for model in NAMED_MODELS)
    assert models_list(["--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert records[0]["name"] == DEFAULT_MODEL
    assert records[0]["state"] == "not downloaded"


def test_list_needs_no_torch() -> None:
    script = "import sys, serving.commands as c; c.models_list([]); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
