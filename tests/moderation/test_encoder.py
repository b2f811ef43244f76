from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moderation.encoder import MAX_TOKENS, TOKENIZER_FILE, Encoder, EncoderShape, pack_embeddings, pack_matrix
from moderation.errors import ModerationError, WeightsError
from moderation.network import Network
from moderation.pretrained import build_tokenizer
from moderation.targets import OUTPUTS
from moderation.train_encoder import pack_network
from moderation.weight_files import CONFIG_FILE, TENSORS_FILE

pytestmark = pytest.mark.unit

LETTERS = "abcdefghijklmnopqrstuvwxyz你好世界"
PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
SHAPE = EncoderShape(vocab=len(PIECES), hidden=64, layers=2, heads=4, inner=96, positions=MAX_TOKENS, eps=1e-12)
TEXTS = ["hello world", "你好 世界", "a", "", "the quick brown fox jumps over the lazy dog"]


def make_network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = Network(SHAPE, len(OUTPUTS))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3)
        # The embeddings lie on their 4-bit grid and the matrices on their 8-bit one, as after reading them back.
        network.words.weight.copy_(_on_embedding_grid(network.words.weight))
        for name, parameter in network.named_parameters():
            if name.startswith("layers.") and parameter.ndim == 2:
                codes, scales = pack_matrix(parameter.numpy())
                parameter.copy_(torch.from_numpy(codes * scales[:, None]))
        network.places.weight.copy_(network.places.weight.half().float())
    return network.eval()


def _on_embedding_grid(weight: torch.Tensor) -> torch.Tensor:
    codes, scales = pack_embeddings(weight.numpy())
    return torch.from_numpy(unpack_embeddings(codes, scales))


def unpack_embeddings(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    values = np.stack([codes & 15, codes >> 4], -1).reshape(*scales.shape, -1).astype(np.float32) - 8.0
    return (values * scales.astype(np.float32)[..., None]).reshape(len(codes), -1)


@pytest.fixture
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_shape: object) -> str:
        return "a test of the plain ones"

    monkeypatch.setattr("moderation.native_layers.why_not_native", refuse)


def save(network: Network, directory: Path) -> Path:
    pack_network(network, build_tokenizer(PIECES), "1").write(directory)
    return directory


def torch_logits(network: Network, rows: Sequence[Sequence[int]]) -> np.ndarray:
    with torch.no_grad():
        found = [network(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[0] for row in rows]
    return torch.stack(found).numpy()


@pytest.mark.usefixtures("plain_layers")
def test_numpy_computes_what_torch_computes(tmp_path: Path) -> None:
    network = make_network()
    encoder = Encoder.load(save(network, tmp_path / "encoder"))
    rows = [encoder.tokenize(text) for text in TEXTS]

    np.testing.assert_allclose(encoder.forward(rows), torch_logits(network, rows), atol=2e-4)


@pytest.mark.usefixtures("plain_layers")
def test_the_tolerance_notices_a_wrong_scale(tmp_path: Path) -> None:
    network = make_network()
    encoder = Encoder.load(save(network, tmp_path / "encoder"))
    with torch.no_grad():
        network.get_submodule("layers.0.down").get_parameter("weight").mul_(1.01)
    rows = [encoder.tokenize(text) for text in TEXTS]

    assert np.abs(encoder.forward(rows) - torch_logits(network, rows)).max() > 2e-4


def test_padding_changes_nothing_in_training() -> None:
    network = make_network()
    row = [0, 7, 9, 5, 2]
    padded, is_token = torch.tensor([[*row, 1, 1]]), torch.tensor([[True] * 5 + [False] * 2])

    with torch.no_grad():
        found = network(padded, is_token)[0].numpy()

    np.testing.assert_allclose(found, torch_logits(network, [row])[0], atol=1e-5)


def test_a_text_scores_alone_as_in_company(tmp_path: Path) -> None:
    encoder = Encoder.load(save(make_network(), tmp_path / "encoder"))
    texts = TEXTS * 30

    together = encoder.logits(texts)

    alone = np.concatenate([encoder.logits([text]) for text in TEXTS] * 30)
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_a_long_text_is_cut_and_a_lone_surrogate_read(tmp_path: Path) -> None:
    encoder = Encoder.load(save(make_network(), tmp_path / "encoder"))

    assert len(encoder.tokenize("ab " * 10_000)) == MAX_TOKENS
    assert np.isfinite(encoder.logits(["\ud800 a \udfff", "\x00", "ab" * 5000])).all()


@given(st.integers(0, 2**32 - 1))
def test_embeddings_on_the_grid_come_back_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, scales = rng.integers(0, 16, (5, 64)), rng.normal(0, 0.1, (5, 2)).astype(np.float16)
    codes[:, [3, 40]] = 0  # every group reaches the end of its grid, as Q4_0 has it
    values = (codes.reshape(5, 2, 32).astype(np.float32) - 8) * scales.astype(np.float32)[..., None]

    found = unpack_embeddings(*pack_embeddings(values.reshape(5, 64)))

    np.testing.assert_array_equal(found, values.reshape(5, 64))


def test_matrices_keep_to_half_a_step_of_their_row() -> None:
    values = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    values[2] = 0.0

    codes, scales = pack_matrix(values)

    assert (np.abs(codes * scales[:, None] - values) <= 0.5001 * scales[:, None]).all()


@pytest.mark.parametrize("name", [TENSORS_FILE, TOKENIZER_FILE, CONFIG_FILE])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    directory = save(make_network(), tmp_path / "encoder")
    (directory / name).write_bytes((directory / name).read_bytes()[:-20])

    with pytest.raises(WeightsError, match=name):
        Encoder.load(directory)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ModerationError, match="encoder sizes"):
        replace(SHAPE, heads=7)
