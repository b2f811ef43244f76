"""Fine-tunes the pretrained trunk on labelled rows and stores the result in the form that `moderation.encoder` reads.

Deterministic for one seed, thread count and machine. The word embeddings stay as they came, in 4 bits; the matrices
are trained in float32 with bfloat16 products and stored in 8 bits. A checkpoint every few hundred steps holds weights
and optimizer; a second start with the same rows and options goes on from there.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from moderation.encoder import (
    ENCODER_FORMAT,
    FIRST_TOKEN,
    LAST_TOKEN,
    TOKENIZER_FILE,
    EncoderConfig,
    pack_embeddings,
    pack_matrix,
)
from moderation.errors import ModerationError
from moderation.network import Network
from moderation.pretrained import build_tokenizer, choose_pieces, read_trunk
from moderation.rows import Row
from moderation.targets import OUTPUTS, targets_of
from moderation.unmask import unmask
from moderation.weight_files import CONFIG_FILE, TENSORS_FILE
from quant.progress import ProgressSink

__all__ = ["EncoderOptions", "TrainedEncoder", "draw_epoch", "masked_loss", "pack_network", "train_encoder"]

# Large sources of one kind are drawn from anew each epoch; small sources of harmful requests are shown more often.
MOST_ROWS = {"gsm8k_train": 900, "sgd_dialogue": 1500, "t0_p3_part": 2000, "hh_helpful": 2500, "harmfulqa": 900}
REPEATED = {
    "advbench": 2,
    "harmbench": 3,
    "strongreject": 3,
    "dangerousqa": 3,
    "labelled:hh_harmless_base": 3,
    "written_en_idioms": 4,
    "written_zh_idioms": 4,
    "cold": 2,
}
PADDING = 1
# Batches are made of rows of like length out of this many batches' worth.
SORTED_TOGETHER = 40


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """`least_uses`: pieces of the vocabulary that the texts use less often are left out."""

    layers: int = 9
    positions: int = 128
    least_uses: int = 8
    max_tokens: int = 96
    steps: int = 4100
    batch: int = 32
    learning_rate: float = 1e-4
    head_factor: float = 5.0
    weight_decay: float = 0.01
    warm_up: float = 0.06
    dropout: float = 0.1
    category_weight: float = 0.5
    checkpoint_every: int = 250
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainedEncoder:
    config: EncoderConfig
    weights: bytes
    tokenizer: bytes

    def write(self, directory: Path) -> None:
        directory.mkdir()
        (directory / TENSORS_FILE).write_bytes(self.weights)
        (directory / TOKENIZER_FILE).write_bytes(self.tokenizer)
        (directory / CONFIG_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self.config), indent=1) + b"\n")


@dataclass(frozen=True, slots=True)
class Batch:
    """ids: (rows, tokens) int64; is_token: the same shape, False on padding; targets: (rows, outputs), NaN unknown."""

    ids: Tensor
    is_token: Tensor
    targets: Tensor


def train_encoder(
    rows: Sequence[Row],
    vocabulary_texts: Iterable[str],
    trunk_file: Path,
    options: EncoderOptions,
    checkpoint: Path,
    version: str,
    progress: ProgressSink,
) -> TrainedEncoder:
    """checkpoint: a file that may hold an earlier, interrupted run of the same rows and options."""
    torch.manual_seed(options.seed)
    network, tokenizer = _start(trunk_file, vocabulary_texts, options)
    optimizer = _optimizer(network, options)
    key = _run_key(rows, tokenizer, options)
    first = _resume(network, optimizer, checkpoint, key)
    network.train()
    for step, batch in enumerate(_batches(rows, tokenizer, options)):
        if step >= options.steps:
            break
        if step < first:
            continue
        _set_rate(optimizer, options, step)
        _update(network, optimizer, batch, options)
        if (step + 1) % options.checkpoint_every == 0:
            _save(network, optimizer, checkpoint, key, step + 1)
        progress.update("training the encoder", step + 1, options.steps)
    return pack_network(network, tokenizer, version)


def _start(trunk_file: Path, texts: Iterable[str], options: EncoderOptions) -> tuple[Network, Tokenizer]:
    trunk = read_trunk(trunk_file, options.layers, options.positions)
    kept = choose_pieces(trunk, texts, options.least_uses)
    shape = replace(trunk.shape, vocab=len(kept))
    network = Network(shape, len(OUTPUTS), options.dropout)
    tensors = {name: torch.tensor(values) for name, values in trunk.tensors.items()}
    tensors["words.weight"] = tensors["words.weight"][torch.tensor(kept)]
    missing = network.load_state_dict(tensors, strict=False).missing_keys
    assert set(missing) == {"pool.weight", "pool.bias", "head.weight", "head.bias"}, missing
    network.words.weight.requires_grad_(False)
    return network, build_tokenizer([trunk.pieces[index] for index in kept])


def _optimizer(network: Network, options: EncoderOptions) -> torch.optim.AdamW:
    head = [*network.head.parameters(), *network.pool.parameters()]
    is_head = {id(parameter) for parameter in head}
    trunk = [p for p in network.parameters() if p.requires_grad and id(p) not in is_head]
    groups = [
        {"params": [p for p in trunk if p.ndim > 1], "weight_decay": options.weight_decay, "factor": 1.0},
        {"params": [p for p in trunk if p.ndim == 1], "weight_decay": 0.0, "factor": 1.0},
        {"params": head, "weight_decay": options.weight_decay, "factor": options.head_factor},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def _set_rate(optimizer: torch.optim.AdamW, options: EncoderOptions, step: int) -> None:
    """Up in a straight line over the warm-up, then down in one to a fiftieth."""
    rising = (step + 1) / max(1.0, options.warm_up * options.steps)
    share = min(1.0, rising, max(0.02, 1.0 - step / options.steps))
    for group in optimizer.param_groups:
        group["lr"] = options.learning_rate * group["factor"] * share


def _update(network: Network, optimizer: torch.optim.AdamW, batch: Batch, options: EncoderOptions) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(batch.ids, batch.is_token)
    loss = masked_loss(logits.float(), batch.targets, options.category_weight)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def masked_loss(logits: Tensor, targets: Tensor, category_weight: float) -> Tensor:
    """Binary cross-entropy of the decision, plus that of the categories where the target is known.

    logits, targets: (rows, outputs), the decision first; NaN targets are unknown and cost nothing. Returns a scalar:
    the mean over rows of the decision + category_weight * the mean over outputs of the mean over known rows.
    """
    is_known = ~targets.isnan()
    losses = functional.binary_cross_entropy_with_logits(logits, targets.nan_to_num(0.0), reduction="none") * is_known
    categories = losses[:, 1:].sum(0) / is_known[:, 1:].sum(0).clamp(min=1)
    return losses[:, 0].mean() + category_weight * categories.mean()


def draw_epoch(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """Shuffled rows of one epoch, sources weighted by MOST_ROWS and REPEATED."""
    of_source: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_source[row.source].append(row)
    drawn: list[Row] = []
    for source, offered in of_source.items():
        most = min(MOST_ROWS.get(source, len(offered)), len(offered))
        drawn += rng.sample(offered, most) * REPEATED.get(source, 1)
    rng.shuffle(drawn)
    return drawn


def _batches(rows: Sequence[Row], tokenizer: Tokenizer, options: EncoderOptions) -> Generator[Batch]:
    """Endless; the same for the same seed."""
    encode = _encoder(tokenizer, options.max_tokens)
    rng = random.Random(options.seed)  # noqa: S311 - draws rows, guards no secret
    while True:
        epoch = draw_epoch(rows, rng)
        for start in range(0, len(epoch), options.batch * SORTED_TOGETHER):
            chunk = sorted(
                epoch[start : start + options.batch * SORTED_TOGETHER], key=lambda row: len(encode(row.text))
            )
            batches = [chunk[i : i + options.batch] for i in range(0, len(chunk), options.batch)]
            rng.shuffle(batches)
            yield from (_collate(batch, encode) for batch in batches)


def _encoder(tokenizer: Tokenizer, max_tokens: int) -> Callable[[str], list[int]]:
    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in known:
            ids = tokenizer.encode(unmask(text), add_special_tokens=False).ids[: max_tokens - 2]
            known[text] = [FIRST_TOKEN, *ids, LAST_TOKEN]
        return known[text]

    return encode


def _collate(rows: Sequence[Row], encode: Callable[[str], list[int]]) -> Batch:
    encoded = [encode(row.text) for row in rows]
    longest = max(map(len, encoded))
    padded = [ids + [PADDING] * (longest - len(ids)) for ids in encoded]
    lengths = torch.tensor([len(ids) for ids in encoded])
    is_token = torch.arange(longest)[None, :] < lengths[:, None]
    return Batch(torch.tensor(padded), is_token, torch.tensor([targets_of(row) for row in rows]))


def _run_key(rows: Sequence[Row], tokenizer: Tokenizer, options: EncoderOptions) -> str:
    """Hash of everything that decides the weights."""
    digest = hashlib.sha256(tokenizer.to_str().encode())
    digest.update(msgspec.json.encode(asdict(options)))
    for row in rows:
        digest.update(msgspec.json.encode(row))
    return digest.hexdigest()


def _save(network: Network, optimizer: torch.optim.AdamW, path: Path, key: str, step: int) -> None:
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors["random"] = torch.get_rng_state()
    for name, parameter in network.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"key": key, "step": str(step)})
    partial.replace(path)


def _resume(network: Network, optimizer: torch.optim.AdamW, path: Path, key: str) -> int:
    """Steps that were done already; 0 where the file is missing. Raises ModerationError for another run's file."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ModerationError(f"checkpoint {path} cannot be read ({error}); delete it to start anew") from None
    if metadata.get("key") != key:
        raise ModerationError(
            f"checkpoint {path} is of another run; delete it, or use the rows and options it was made with"
        )
    network.load_state_dict(
        {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
    )
    torch.set_rng_state(tensors["random"])
    step = int(metadata["step"])
    for name, parameter in network.named_parameters():
        if f"exp_avg.{name}" in tensors:
            moments = {moment: tensors[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def pack_network(network: Network, tokenizer: Tokenizer, version: str) -> TrainedEncoder:
    state = {name: value.detach().float().numpy() for name, value in network.state_dict().items()}
    arrays: dict[str, np.ndarray] = {}
    arrays["words.codes"], arrays["words.scales"] = pack_embeddings(state.pop("words.weight"))
    arrays["places"] = state.pop("places.weight").astype(np.float16)
    arrays["pool.weight"] = state.pop("pool.weight")[0]
    # The softmax over tokens does not see a constant.
    del state["pool.bias"]
    for name, values in state.items():
        if name.startswith("layers.") and values.ndim == 2:
            stem = name.removesuffix(".weight")
            arrays[f"{stem}.codes"], arrays[f"{stem}.scales"] = pack_matrix(values)
        else:
            arrays[name] = values
    weights = save_arrays({name: np.ascontiguousarray(values) for name, values in arrays.items()})
    text = tokenizer.to_str().encode()
    config = EncoderConfig(version, network.shape, OUTPUTS, _sha256(weights), _sha256(text), ENCODER_FORMAT)
    return TrainedEncoder(config, weights, text)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
