"""Asks the moderation policy before anything else happens, and fails closed: no verdict, no answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from moderation.policy import Turn, Verdict
from serving.errors import ContentFlagged, ModerationUnavailable
from serving.gateway.ports import ModerationPort

logger = logging.getLogger(__name__)

# The classifier takes well under a millisecond for a message. A long conversation must not hold up other streams.
INLINE_CHARACTERS = 20_000
REFUSAL = "I can't help with that: the message was refused by this server's content policy."

T = TypeVar("T")


async def judge_input(policy: ModerationPort, turns: Sequence[Turn]) -> Verdict:
    """Raises ModerationUnavailable when there is no verdict, whatever the reason."""
    return await _judge(lambda: policy.judge_input(turns), sum(len(turn.content) for turn in turns))


async def judge_texts(policy: ModerationPort, texts: Sequence[str]) -> list[Verdict]:
    """Raises ModerationUnavailable when there is no verdict, whatever the reason."""
    return await _judge(lambda: policy.judge_texts(texts), sum(map(len, texts)))


async def judge_prompts(policy: ModerationPort, prompts: Sequence[str]) -> Verdict:
    """The verdict on the worst of several independent prompts. Raises ModerationUnavailable without one."""
    verdicts = [await judge_input(policy, [Turn("user", prompt)]) for prompt in prompts]
    return max(verdicts, key=lambda verdict: (verdict.flagged, verdict.probability))


async def _judge(judge: Callable[[], T], num_characters: int) -> T:
    try:
        return judge() if num_characters <= INLINE_CHARACTERS else await asyncio.to_thread(judge)
    except Exception:
        logger.exception("moderation_failed characters=%d", num_characters)
        message = "moderation is not available, so nothing is answered; the server's log says why"
        raise ModerationUnavailable(message, retry_after_s=5) from None


def flagged_error(verdict: Verdict, param: str) -> ContentFlagged:
    """The refusal, with the overall score and those of the flagged categories."""
    scores = {"moderation": verdict.probability}
    scores |= {name: verdict.category_scores[name] for name, is_flagged in verdict.categories.items() if is_flagged}
    result: dict[str, object] = {name: {"filtered": True, "score": round(score, 4)} for name, score in scores.items()}
    message = "The request was refused by this server's content policy. Please change it and try again."
    return ContentFlagged(message, result, param=param)
