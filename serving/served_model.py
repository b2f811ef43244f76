"""What the gateway needs of a model directory beside the weights: tokenizer, chat format, sampling defaults, a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from quant.errors import CheckpointError
from quant.model_directory import read_manifest
from serving.gateway.ports import ServedModel
from serving.gateway.sampling import generation_defaults
from serving.model.chat_format import ChatFormat, NoChatTemplateError
from serving.model.tokenizer import ModelTokenizer
from serving.models import NAMED_MODELS, resolve

__all__ = ["ModelTexts", "load_texts", "model_id_of"]


class ModelTexts:
    """Everything that can be loaded before the engine has said how long a context it takes."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = ModelTokenizer.load(directory)
        self.chat_format = _load_chat_format(directory, self.tokenizer)
        self.defaults = generation_defaults(_read_generation_config(directory))
        self.created = int((directory / "config.json").stat().st_mtime)

    def served_as(self, model_id: str, max_context: int) -> ServedModel:
        return ServedModel(
            model_id=model_id,
            tokenizer=self.tokenizer,
            chat_format=self.chat_format,
            max_context=max_context,
            created=self.created,
            defaults=self.defaults,
        )


def load_texts(directory: Path) -> ModelTexts:
    """Raises CheckpointError for a directory whose texts cannot be read, or that was trained with other ones."""
    return ModelTexts(directory)


def model_id_of(model: str) -> str:
    """What clients call the model: its registry name, its hub id, or its directory's name."""
    reference = resolve(model)
    if reference.directory is not None:
        return reference.directory.name
    is_named = any(named.name == reference.slug for named in NAMED_MODELS)
    return reference.slug if is_named or reference.hub_id is None else reference.hub_id


def _load_chat_format(directory: Path, tokenizer: ModelTokenizer) -> ChatFormat | None:
    """None for a base model. The format must be the one the weights were trained with, where that is recorded."""
    manifest = read_manifest(directory)
    trained_with = manifest.chat_format_sha256 if manifest is not None else None
    try:
        chat_format = ChatFormat.load(directory, tokenizer)
    except NoChatTemplateError:
        chat_format = None
    found = chat_format.sha256 if chat_format is not None else "none"
    if trained_with is not None and found != trained_with:
        raise CheckpointError(
            f"{directory}: its chat template (sha256 {found[:12]}) is not the one its weights were trained with "
            f"({trained_with[:12]}); restore the template, or make the directory again"
        )
    return chat_format


def _read_generation_config(directory: Path) -> dict[str, object]:
    file = directory / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); expected a JSON object") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}; expected a JSON object")
    return cast("dict[str, object]", config)
