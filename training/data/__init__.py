"""Rows to learn from: conversations, ranked answers, prompts and text, checked before any training. Loads no torch."""

from training.data.load import (
    CleaningReport,
    Loaded,
    LoadPolicy,
    load_conversations,
    load_documents,
    load_prompts,
    load_rankings,
)
from training.data.records import Conversation, Document, Prompt, Ranking

__all__ = [
    "CleaningReport",
    "Conversation",
    "Document",
    "LoadPolicy",
    "Loaded",
    "Prompt",
    "Ranking",
    "load_conversations",
    "load_documents",
    "load_prompts",
    "load_rankings",
]
