"""causerie-tiny, the model that comes with the installation: by its name, and in place of a default out of reach.

Most tests put a random PaLM model in its place, in a copy of the packages, so that they are about the product.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from quant.run.quantize_directory import QuantizeOptions
from serving.child_process import child_environment, python_command
from serving.model.weights import load_decoder
from serving.models import DEFAULT_MODEL, NAMED_MODELS, RELEASE_FOLDER, RELEASED_MODEL
from tests.quant.tiny_models import PALM, write_source
from tests.serving.model.tiny_tokenizers import write_tokenizer
from tests.system.server_process import START_TIMEOUT_S, ServerProcess, running_server
from tests.test_layout import PACKAGES

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
# pip tries some seconds before it gives up.
FALL_BACK_TIMEOUT_S = 180.0


def write_random_model(directory: Path, work: Path) -> None:
    """A 4-bit PaLM model with a real tokenizer and chat format."""
    from quant.commands import quantize_directory
    from quant.progress import SilentProgress

    source = write_source(work, torch.float16, vocab_size=2048, **PALM)
    write_tokenizer("smollm2", source)
    quantize_directory(source, directory, QuantizeOptions(samples=8, seq_len=64), SilentProgress())


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The import path of a copy of the packages whose released model is a random one."""
    root = tmp_path_factory.mktemp("product")
    leave_out = shutil.ignore_patterns("__pycache__", "release")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=leave_out)
    write_random_model(root / "training" / "release" / RELEASED_MODEL, tmp_path_factory.mktemp("source") / "model")
    return root


def out_of_reach(product: Path, tmp_path: Path) -> dict[str, str]:
    """Nothing is cached, nobody listens where the hub should be, and pip finds no package."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    no_package = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    return {"PYTHONPATH": str(product), "CAUSERIE_CACHE": str(tmp_path / "cache"), **nowhere, **no_package}


def answer(server: ServerProcess) -> tuple[str, int]:
    """The one model's name, and how many tokens it said."""
    with server.client() as client:
        assert client.get("/").status_code == 200
        (listed,) = client.get("/v1/models").json()["data"]
        asked = {"model": listed["id"], "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
        answered = client.post("/v1/chat/completions", json=asked)
    assert answered.status_code == 200, answered.text
    assert answered.json()["model"] == listed["id"]
    return listed["id"], answered.json()["usage"]["completion_tokens"]


def refused_start(environ: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python_command("serving.cli", "serve", "--port", "0", *arguments),
        env={**child_environment(os.environ), **environ},
        capture_output=True,
        text=True,
        timeout=FALL_BACK_TIMEOUT_S,
    )


def test_named_it_is_served_at_once_with_no_download_and_no_cache(product: Path, tmp_path: Path) -> None:
    with running_server("--model", RELEASED_MODEL, environ=out_of_reach(product, tmp_path), cwd=tmp_path) as server:
        server.wait_for_line("ready", START_TIMEOUT_S)
        assert answer(server)[0] == RELEASED_MODEL
        assert " ..." not in server.log  # how a stage of a preparation begins
    assert list(tmp_path.iterdir()) == []


def test_it_takes_the_place_of_a_default_model_out_of_reach_and_says_so(product: Path, tmp_path: Path) -> None:
    with running_server(environ=out_of_reach(product, tmp_path), cwd=tmp_path) as server:
        line = server.wait_for_line("serving", FALL_BACK_TIMEOUT_S)
        assert line.startswith(f"serving {RELEASED_MODEL}, which comes with causerie, instead of {DEFAULT_MODEL}: ")
        assert RELEASED_MODEL in server.wait_for_line("ready", START_TIMEOUT_S)
        name, num_tokens = answer(server)
    assert name == RELEASED_MODEL
    assert num_tokens > 0


def test_it_never_takes_the_place_of_a_model_that_was_named(product: Path, tmp_path: Path) -> None:
    refused = refused_start(out_of_reach(product, tmp_path), "--model", DEFAULT_MODEL)
    assert refused.returncode == 1
    assert "could not be fetched" in refused.stderr.splitlines()[-1]
    assert RELEASED_MODEL not in refused.stdout + refused.stderr


def test_an_installation_without_it_says_so(product: Path, tmp_path: Path) -> None:
    release = product / "training" / "release"
    hidden = release.rename(tmp_path / "release")
    try:
        refused = refused_start(out_of_reach(product, tmp_path), "--model", RELEASED_MODEL)
    finally:
        hidden.rename(release)
    assert refused.returncode == 1
    assert "this installation has no" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_released_weights_are_what_the_list_says_and_answer(tmp_path: Path) -> None:
    directory = RELEASE_FOLDER / RELEASED_MODEL
    (named,) = (model for model in NAMED_MODELS if model.name == RELEASED_MODEL)
    spec = load_decoder(directory).spec
    layer = 2 * spec.hidden_size * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    layer += 3 * spec.hidden_size * spec.intermediate_size + spec.hidden_size
    assert spec.vocab_size * spec.hidden_size + spec.num_layers * layer + spec.hidden_size == named.parameters
    assert sum(path.stat().st_size for path in directory.glob("*.safetensors")) <= 8e6
    with running_server("--model", RELEASED_MODEL, cwd=tmp_path) as server:
        server.wait_for_line("ready", START_TIMEOUT_S)
        assert answer(server) == (RELEASED_MODEL, 4)
