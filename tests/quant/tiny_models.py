"""A decoder small enough to quantise in a test, and a `ModelAccess` that reads it from its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from quant.progress import ProgressSink
from quant.report.measure import RowLogits
from quant.report.quantization_report import DecodeSpeed
from quant.run.calibration import Encoder, Row
from quant.walk.layer_source import LayerSource
from serving.model.layer_source import DirectoryLayers
from serving.model.spec import spec_from_config
from serving.model.transformer import Decoder
from serving.model.weights import load_decoder, save_decoder

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
PALM: dict[str, object] = {
    "architectures": ["CohereForCausalLM"],
    "model_type": "cohere",
    "num_key_value_heads": 1,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.125,
}

# Neither has a gate. Their checkpoints hold queries, keys and values as one linear.
BLOOM: dict[str, object] = {"architectures": ["BloomForCausalLM"], "model_type": "bloom"}
GPT_NEOX: dict[str, object] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
}


def tiny_decoder(**changes: object) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(spec_from_config({**CONFIG, **changes})).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder


def tiny_ids(samples: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Mostly a few favourite tokens, so that inputs are correlated as in real text."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.logspace(0, -3, 128)
    return torch.multinomial(chances.expand(samples, -1), tokens, replacement=True, generator=generator)


def write_source(directory: Path, dtype: torch.dtype = torch.float16, **changes: object) -> Path:
    """`changes` to CONFIG."""
    directory.mkdir(parents=True, exist_ok=True)
    save_decoder(tiny_decoder(**changes).to(dtype), directory, {**CONFIG, **changes})
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}), encoding="utf-8")
    return directory


class TinyAccess:
    """Texts as bytes below 128. `serves` says whether there is a serving path to measure."""

    def __init__(self, *, serves: bool = True) -> None:
        self._serves = serves

    def open(self, directory: Path) -> LayerSource:
        return DirectoryLayers(directory)

    def encoder(self, directory: Path) -> Encoder:
        def encode(row: Row) -> list[int]:
            text = row.text + "".join(message.content for message in row.messages)
            return [ord(letter) % 128 for letter in text]

        return encode

    def chat_format_sha256(self, directory: Path) -> str | None:
        return "f" * 64

    def serve_windows(
        self, directory: Path, windows: torch.Tensor, progress: ProgressSink, stage: str
    ) -> RowLogits | None:
        if not self._serves:
            return None
        decoder = load_decoder(directory, dtype=torch.bfloat16)
        return lambda window, rows: decoder(windows[window][None])[0, rows].to(torch.float32)

    def decode_speeds(self, directories: Sequence[Path]) -> list[DecodeSpeed | None]:
        return [
            DecodeSpeed(0.5, 100.0 * place, 1) if self._serves else None for place in range(1, len(directories) + 1)
        ]
