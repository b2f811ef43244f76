"""Moderation of one request, in both directions: asks the policy, counts, and tells the sink what was decided.

Judging runs in threads: a long conversation, or a classifier with a slow second stage, must not hold up other streams.
Fails closed unless the rules say otherwise: no verdict, no answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from moderation.categories import Category, complete_flags, complete_scores
from moderation.policy import Direction, Sensitivity, Turn, Verdict
from moderation.stream_filter import JudgingFilter, PassThrough, StreamFilter
from serving.errors import ContentFlagged, ModerationUnavailable
from serving.gateway.fields import JsonObject
from serving.gateway.ports import Decision, DirectionRules, ModerationRules, Outcome, Services

logger = logging.getLogger(__name__)

ERROR_MESSAGE = "The request was refused by this server's content policy. Please change it and try again."
REFUSAL = "I can't help with that: the message was refused by this server's content policy."
WITHHELD = "The rest of this answer was withheld by this server's content policy."

# Stands in the stream filter for a verdict that could not be had, where the rules let the text pass.
_UNJUDGED = Verdict(False, 0.0, 1.0, complete_flags({}), complete_scores({}))

T = TypeVar("T")


class Moderation:
    """What one request asks: about its input once, about its choices while they grow."""

    def __init__(self, services: Services, rules: ModerationRules, request_id: str) -> None:
        self.rules = rules
        self.withheld_message = rules.message or WITHHELD
        self._services = services
        self._request_id = request_id
        self._contexts: Sequence[str] = ()
        self._unjudged_choices: set[int] = set()

    async def judge_input(self, *conversations: Sequence[Turn]) -> Verdict | None:
        """The verdict on the worst of independent conversations; None when the rules let it pass without one.

        Raises ModerationUnavailable when there is no verdict and the rules want one, whatever the reason.
        """
        if self.rules.input.mode == "off":
            return None
        try:
            verdict = await asyncio.to_thread(self._judge, "input", lambda: self._worst(conversations))
        except ModerationUnavailable:
            await self._tell(Decision(self._request_id, "input", None, "failed_closed", None))
            raise
        outcome: Outcome = "failed_open" if verdict is None else self._outcome("input", verdict)
        text = "\n".join(turn.content for turns in conversations for turn in turns)
        await self._tell(Decision(self._request_id, "input", None, outcome, verdict, text))
        return verdict

    def refuses(self, verdict: Verdict | None) -> bool:
        return verdict is not None and self._outcome("input", verdict) == "blocked"

    def continue_texts(self, contexts: Sequence[str]) -> None:
        """Choice by choice. A context that was let through although it is flagged would flag every answer to it."""
        if self.rules.input.mode == "block":
            self._contexts = contexts

    def new_filter(self, choice_index: int) -> StreamFilter:
        mode = self.rules.output.mode
        if mode == "off":
            return PassThrough()
        context = self._contexts[choice_index] if self._contexts else ""

        def judge(window: str) -> Verdict:
            verdict = self._judge("output", lambda: self.rules.policy.judge_output(context, window))
            if verdict is None:
                self._unjudged_choices.add(choice_index)
            return verdict or _UNJUDGED

        return JudgingFilter(judge, only_observes=mode == "log")

    async def choice_decided(self, choice_index: int, stream_filter: StreamFilter) -> None:
        """Tells how a choice ended: its flagged window, or the most severe one."""
        verdict = None if stream_filter.verdict is _UNJUDGED else stream_filter.verdict
        if verdict is not None and verdict.flagged:
            outcome = self._outcome("output", verdict)
        elif stream_filter.is_stopped:
            outcome = "failed_closed"
        elif choice_index in self._unjudged_choices:
            outcome = "failed_open"
        elif verdict is not None:
            outcome = "passed"
        else:
            return  # off, or no text came
        text = stream_filter.flagged_text
        await self._tell(Decision(self._request_id, "output", choice_index, outcome, verdict, text))

    def _worst(self, conversations: Sequence[Sequence[Turn]]) -> Verdict:
        verdicts = [self.rules.policy.judge_input(turns) for turns in conversations]
        return max(verdicts, key=lambda verdict: (verdict.flagged, verdict.severity, verdict.probability))

    def _judge(self, direction: Direction, judge: Callable[[], Verdict]) -> Verdict | None:
        """Runs in a thread. None when there is no verdict and the rules let the text pass."""
        started = time.perf_counter()
        metrics, rules = self._services.metrics, self.rules.of(direction)
        try:
            return judge()
        except Exception:
            logger.exception("moderation_failed request=%s direction=%s", self._request_id, direction)
            metrics.moderation_failed(direction)
            if rules.fail == "open" or rules.mode == "log":
                return None
            raise unavailable() from None
        finally:
            metrics.observe_moderation(direction, time.perf_counter() - started)

    def _outcome(self, direction: Direction, verdict: Verdict) -> Outcome:
        if not verdict.flagged:
            return "passed"
        return "blocked" if self.rules.of(direction).mode == "block" else "logged"

    async def _tell(self, decision: Decision) -> None:
        verdict = decision.verdict
        is_flagged = verdict is not None and verdict.flagged
        if verdict is not None and verdict.flagged:
            self._services.metrics.flagged(decision.direction)
            logger.info(
                "moderation_flagged request=%s direction=%s choice=%s outcome=%s reason=%s probability=%.3f",
                self._request_id,
                decision.direction,
                "-" if decision.choice_index is None else decision.choice_index,
                decision.outcome,
                verdict.reason,
                verdict.probability,
            )
        if not (is_flagged and self.rules.records_text):
            decision = replace(decision, text=None)
        try:
            await self._services.sink.record_decision(decision)
        except Exception:
            logger.exception("decision_not_recorded request=%s", self._request_id)


async def judge_alone(judge: Callable[[], T]) -> T:
    """For who asks for a verdict and nothing else: there is one, or ModerationUnavailable."""
    try:
        return await asyncio.to_thread(judge)
    except Exception:
        logger.exception("moderation_failed")
        raise unavailable() from None


def unavailable() -> ModerationUnavailable:
    message = "moderation is not available, so nothing is answered; the server's log says why"
    return ModerationUnavailable(message, retry_after_s=5)


def flagged_error(verdict: Verdict, param: str, message: str | None) -> ContentFlagged:
    """The refusal, with the overall score, those of the flagged categories and of an extension that flagged."""
    scores = {"moderation": verdict.probability}
    scores |= {name: verdict.category_scores[name] for name, is_flagged in verdict.categories.items() if is_flagged}
    if verdict.reason in verdict.extension_scores:
        scores[verdict.reason] = verdict.extension_scores[verdict.reason]
    result: dict[str, object] = {name: {"filtered": True, "score": round(score, 4)} for name, score in scores.items()}
    return ContentFlagged(message or ERROR_MESSAGE, result, param=param)


def rules_json(rules: ModerationRules) -> JsonObject:
    """What is in force, for `/v1/models` and `/health/ready`."""
    policy = rules.policy
    trained = [category.value for category in policy.trained_categories]
    return {
        "model": policy.model_id,
        "input": _direction_json(rules.input, policy.options.input),
        "output": _direction_json(rules.output, policy.options.output),
        "trained_categories": list(trained),
        "untrained_categories": [category.value for category in Category if category.value not in trained],
        "extensions": list(policy.trained_extensions),
    }


def _direction_json(rules: DirectionRules, sensitivity: Sensitivity) -> JsonObject:
    return {
        "mode": rules.mode,
        "fail": rules.fail,
        "preset": sensitivity.preset if sensitivity.threshold is None else None,
        "threshold": sensitivity.threshold,
        "category_thresholds": dict(sensitivity.category_thresholds),
    }
