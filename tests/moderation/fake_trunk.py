"""A tiny pretrained trunk in the packed form that `moderation.pretrained` reads, with random weights."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 4, 64, 160
LETTERS = "abcdefghijklmnopqrstuvwxyz你好世界问题"
PIECES = [
    *(("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)),
    *((letter, -5.0) for letter in LETTERS),
    *((word, -4.0) for word in ("▁murder", "▁water", "▁plant", "▁please", "▁the", "▁ünused")),
]
SQUARE = (HIDDEN, HIDDEN)
MATRICES = {"q": SQUARE, "k": SQUARE, "v": SQUARE, "ao": SQUARE, "fi": (INNER, HIDDEN), "fo": (HIDDEN, INNER)}


def write_trunk(path: Path, seed: int = 0) -> Path:
    path.write_bytes(pack_trunk(seed))
    return path


def pack_trunk(seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    vocab = len(PIECES) + 3  # the real file has rows that no piece names, too
    header = struct.pack("<7if", HIDDEN, LAYERS, HEADS, INNER, vocab, POSITIONS, 2, 1e-12)
    header += struct.pack("<6i", 32, len(PIECES), 0, 2, 1, 3)
    texts = [text.encode() for text, _ in PIECES]
    ends = np.cumsum([0, *map(len, texts)]).astype(np.uint32)
    header += struct.pack("<Q", int(ends[-1])) + ends.tobytes()
    header += np.array([score for _, score in PIECES], np.float32).tobytes() + b"".join(texts)
    header += struct.pack("<iI", 1, 9) + struct.pack("<IBI", 0x41, 1, 0x61)
    tensors = _tensors(rng, vocab)
    directory_bytes = 4 + sum(2 + len(name) + 1 + 4 + 16 for name in tensors)
    place = 8 + len(header) + directory_bytes
    directory, content = struct.pack("<i", len(tensors)), b""
    for name, (kind, count, data) in tensors.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, count, place + len(content), len(data))
        content += data
    return b"E5S1" + struct.pack("<i", 1) + header + directory + content


def _tensors(rng: np.random.Generator, vocab: int) -> dict[str, tuple[int, int, bytes]]:
    def floats(*shape: int, scale: float = 0.1, around: float = 0.0) -> tuple[int, int, bytes]:
        values = (rng.normal(around, scale, shape)).astype(np.float32)
        return 0, values.size, values.tobytes()

    def packed(*shape: int) -> tuple[int, int, bytes]:
        groups = rng.integers(0, 256, (int(np.prod(shape)) // 32, 16), dtype=np.uint8)
        groups[:, 0] &= 0xF0  # one value of each group lies at the end of the grid, as a quantiser leaves it
        scales = rng.normal(0, 0.02, (len(groups), 1)).astype(np.float16)
        return 1, int(np.prod(shape)), np.concatenate([scales.view(np.uint8), groups], axis=1).tobytes()

    tensors = {"emb.word": packed(vocab, HIDDEN), "emb.pos": floats(POSITIONS, HIDDEN), "emb.type": floats(2, HIDDEN)}
    tensors |= {"emb.ln.w": floats(HIDDEN, around=1.0), "emb.ln.b": floats(HIDDEN)}
    for index in range(LAYERS):
        for name, shape in MATRICES.items():
            tensors[f"l{index}.{name}.w"] = packed(*shape)
            tensors[f"l{index}.{name}.b"] = floats(shape[0])
        for name in ("aln", "oln"):
            tensors[f"l{index}.{name}.w"] = floats(HIDDEN, around=1.0)
            tensors[f"l{index}.{name}.b"] = floats(HIDDEN)
    return tensors


def unpack_plainly(content: bytes) -> npt.NDArray[np.float32]:
    """Q4_0 value by value, the twin of the reader's vector form."""
    values: list[float] = []
    for start in range(0, len(content), 18):
        (scale,) = struct.unpack_from("<e", content, start)
        codes = content[start + 2 : start + 18]
        values += [((code & 15) - 8) * scale for code in codes]
        values += [((code >> 4) - 8) * scale for code in codes]
    return np.array(values, np.float32)
