"""The server's side of the preparation process, with a script in the place of `serving.preparation`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from quant.model_directory import Manifest, write_manifest
from serving import preparation_child
from serving.model_sources import SourceUnavailableError
from serving.models import model_folder, prepared_directory, resolve
from serving.preparation_child import find_prepared, find_source, prepare_in_child

pytestmark = pytest.mark.unit


class Recorded:
    def __init__(self) -> None:
        self.updates: list[tuple[str, float, float]] = []
        self.first = asyncio.Event()

    def update(self, stage: str, done: float, total: float) -> None:
        self.updates.append((stage, done, total))
        self.first.set()


def replace_preparation(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    def command(module: str, *arguments: str) -> list[str]:
        assert module == "serving.preparation"
        return [sys.executable, "-c", script, *arguments]

    monkeypatch.setattr(preparation_child, "python_command", command)


async def test_progress_is_passed_on_and_the_directory_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """print('{"stage": "Downloading", "done": 1, "total": 2}\\nnoise\\n{"ready": "/models/x"}')"""
    replace_preparation(monkeypatch, script)
    progress = Recorded()
    assert await prepare_in_child("m", progress) == Path("/models/x")
    assert progress.updates == [("Downloading", 1, 2)]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("""print('{"error": "no network: connect once"}'); raise SystemExit(1)""", "no network: connect once"),
        ("raise SystemExit(3)", "preparation of m ended with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
    ],
)
async def test_a_failure_has_its_reason(monkeypatch: pytest.MonkeyPatch, script: str, reason: str) -> None:
    replace_preparation(monkeypatch, script)
    with pytest.raises(CheckpointError, match=reason):
        await prepare_in_child("m", Recorded())


@pytest.mark.parametrize(("is_unavailable", "refused"), [("true", SourceUnavailableError), ("false", CheckpointError)])
async def test_a_source_that_cannot_be_had_is_told_from_a_model_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, is_unavailable: str, refused: type[CheckpointError]
) -> None:
    replace_preparation(monkeypatch, f"""print('{{"error": "no", "is_unavailable": {is_unavailable}}}')""")
    with pytest.raises(CheckpointError) as raised:
        await prepare_in_child("m", Recorded())
    assert type(raised.value) is refused


async def test_cancelling_stops_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    script = f"""
import pathlib, signal, sys
def stop(*_):
    pathlib.Path({str(ended)!r}).touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
print('{{"stage": "s", "done": 0, "total": 1}}', flush=True)
signal.pause()
"""
    replace_preparation(monkeypatch, script)
    progress = Recorded()
    preparing = asyncio.create_task(prepare_in_child("m", progress))
    await progress.first.wait()
    preparing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await preparing
    assert ended.exists()


def test_a_prepared_model_is_found_without_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAUSERIE_CACHE", str(tmp_path))
    model = "smollm2-135m-instruct"
    assert find_prepared(model) is None
    reference = resolve(model)
    prepared = prepared_directory(model_folder(tmp_path, reference), reference)
    prepared.mkdir(parents=True)
    write_manifest(prepared, Manifest(stage="quantize"))
    assert find_prepared(model) == prepared


def test_a_quantised_directory_is_served_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {}}', encoding="utf-8")
    assert find_prepared(str(tmp_path)) == tmp_path


def test_plain_weights_that_are_there_need_no_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAUSERIE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    assert find_source(str(tmp_path)) == tmp_path
    model = "smollm2-135m-instruct"
    assert find_source(model) is None
    source = model_folder(tmp_path / "cache", resolve(model)) / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    write_manifest(source, Manifest(stage="source"))
    assert find_source(model) == source


def test_a_quantised_directory_has_no_plain_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(CheckpointError, match="quantised already, and load_in rounds plain weights"):
        find_source(str(tmp_path))


async def test_plain_weights_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_preparation(monkeypatch, """import sys; print('{"ready": "' + ' '.join(sys.argv[1:]) + '"}')""")
    assert await prepare_in_child("m", Recorded(), is_plain=True) == Path("--plain m")
