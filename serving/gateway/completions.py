"""POST /v1/completions: plain continuation of one or several prompts. The path of a chat without the chat template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from moderation.policy import Turn
from serving.engine.requests import TokenLogprob
from serving.errors import InvalidRequest
from serving.gateway.answering import TurnContext, cache_salt, check_model_name, max_context, refuse, respond, tokenize
from serving.gateway.auth import key_name_of
from serving.gateway.choices import Answer, ChoiceDelta
from serving.gateway.disconnect import unless_client_gone
from serving.gateway.error_responses import json_response
from serving.gateway.fields import JsonObject
from serving.gateway.generation import Generations, Usage
from serving.gateway.json_reader import decode_body
from serving.gateway.judging import Moderation
from serving.gateway.logprobs import completion_logprobs, shown_token
from serving.gateway.ports import ServedModel, Services
from serving.gateway.request_context import context_of
from serving.gateway.sampling import resolve_sampling
from serving.gateway.schemas import CompletionRequest, Prompt, parse_completion
from serving.gateway.scoring import PromptText, score_prompts
from serving.gateway.sse import ChunkWriter, usage_json


async def create_completion(request: Request, services: Services, generations: Generations) -> Response:
    limits, context = services.settings.limits, context_of(request)
    model = services.readiness.require_model()
    asked = parse_completion(decode_body(await request.body()), limits)
    check_model_name(model, asked.model)
    prompts = [await read_prompt(model, prompt) for prompt in asked.prompts]
    turns = tuple(Turn("user", prompt.text) for prompt in prompts)
    shape = CompletionShape(f"cmpl-{context.request_id}", model, int(time.time()), asked, prompts)
    num_choices = asked.sampling.num_choices

    room = max_context(services, model)
    sampling = [
        resolve_sampling(asked.sampling, model.defaults, len(prompt.ids), room, limits.max_tokens, param="prompt")
        for prompt in prompts
    ]
    moderation = Moderation(services, services.rules_of_key(key_name_of(request)), context.request_id)
    verdict = await moderation.judge_input(*([turn] for turn in turns))
    turn = TurnContext(context.request_id, model, moderation, turns, verdict)
    if moderation.refuses(verdict):
        return await refuse(services, shape, asked.stream, turn, num_choices * len(prompts), "prompt")

    salt = cache_salt(request, services)
    if asked.echoes_prompt and shape.has_logprobs:
        scoring = score_prompts(services.engine, context.request_id, prompts, sampling[0].num_top_logprobs or 0, salt)
        shape.scores.extend(await unless_client_gone(request, scoring))
    if asked.sampling.max_tokens == 0:
        return json_response(shape.only_echoed())
    generation = generations.start(context, [prompt.ids for prompt in prompts], sampling, num_choices, salt)
    moderation.continue_texts([prompt.text for prompt in prompts for _ in range(num_choices)])
    answer = Answer(generation, model.tokenizer, moderation, has_logprobs=shape.has_logprobs)
    return await respond(request, services, generation, answer, shape, asked.stream, turn)


async def read_prompt(model: ServedModel, prompt: Prompt) -> PromptText:
    """Text and ids of a prompt that came as either. Raises InvalidRequest for ids outside the vocabulary."""
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        ids = await tokenize(lambda: tokenizer.encode_prompt(prompt), len(prompt))
        text = prompt
    else:
        ids = list(prompt)
        if any(not 0 <= token_id < tokenizer.vocab_size for token_id in ids):
            message = f"prompt has token ids outside 0 to {tokenizer.vocab_size - 1:,}"
            raise InvalidRequest(message, param="prompt")
        text = tokenizer.decode(ids, skip_special=False)
    if not ids:
        raise InvalidRequest("prompt is empty; this model needs at least one token", param="prompt")
    return PromptText(text, ids)


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """`text_completion` objects; the chunks of a stream have the same name. Echoed prompts come before the text."""

    answer_id: str
    model: ServedModel
    created: int
    asked: CompletionRequest
    prompts: Sequence[PromptText]
    scores: list[list[TokenLogprob | None]] = field(default_factory=list[list["TokenLogprob | None"]])

    @property
    def has_logprobs(self) -> bool:
        return self.asked.sampling.num_top_logprobs is not None

    def writer(self) -> ChunkWriter:
        offsets: dict[int, int] = {}

        def logprobs_of(delta: ChoiceDelta) -> JsonObject:
            offset = offsets.get(delta.index, 0)
            offsets[delta.index] = offset + len(delta.text)
            return self._logprobs(delta.logprobs, offset)

        return ChunkWriter(
            self._head(),
            is_chat=False,
            includes_usage=self.asked.stream.includes_usage,
            logprobs_of=logprobs_of if self.has_logprobs else None,
        )

    def opening(self, writer: ChunkWriter, index: int) -> bytes:
        echoed = self._echoed_text(index)
        return writer.delta(ChoiceDelta(index, echoed)) if echoed else b""

    def joined(self, choices: Sequence[ChoiceDelta], usage: Usage) -> JsonObject:
        return {
            **self._head(),
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_json(usage),
        }

    def only_echoed(self) -> JsonObject:
        """The answer to `max_tokens` 0: nothing was generated."""
        num_choices = len(self.prompts) * self.asked.sampling.num_choices
        num_prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        nothing = [ChoiceDelta(index, "", finish_reason="length") for index in range(num_choices)]
        return self.joined(nothing, Usage(num_prompt_tokens, 0))

    def _choice(self, choice: ChoiceDelta) -> JsonObject:
        entries = [*self._echoed_scores(choice.index), *choice.logprobs]
        return {
            "index": choice.index,
            "text": self._echoed_text(choice.index) + choice.text,
            "logprobs": self._logprobs(entries, 0, self._prompt_of(choice.index)) if self.has_logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(
        self, entries: Sequence[TokenLogprob | None], offset: int, prompt: PromptText | None = None
    ) -> JsonObject:
        tokenizer = self.model.tokenizer
        first_id = prompt.ids[0] if prompt is not None else 0  # the only token without an entry
        ids = [first_id if entry is None else entry.token_id for entry in entries]
        tokens = [shown_token(token_id, tokenizer) for token_id in ids]
        return completion_logprobs(entries, tokens, tokenizer, offset)

    def _prompt_of(self, index: int) -> PromptText:
        return self.prompts[index // self.asked.sampling.num_choices]

    def _echoed_text(self, index: int) -> str:
        return self._prompt_of(index).text if self.asked.echoes_prompt else ""

    def _echoed_scores(self, index: int) -> list[TokenLogprob | None]:
        return self.scores[index // self.asked.sampling.num_choices] if self.scores else []

    def _head(self) -> JsonObject:
        return {
            "id": self.answer_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.model_id,
        }
