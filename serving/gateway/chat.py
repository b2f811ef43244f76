"""POST /v1/chat/completions. `create_chat_completion` is the whole path of a request, one step a line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from moderation.policy import Turn
from serving.errors import InvalidRequest
from serving.gateway.answering import TurnContext, cache_salt, check_model_name, max_context, refuse, respond, tokenize
from serving.gateway.auth import key_name_of
from serving.gateway.choices import Answer, ChoiceDelta
from serving.gateway.fields import JsonObject
from serving.gateway.generation import Generations, Usage
from serving.gateway.json_reader import decode_body
from serving.gateway.judging import Moderation
from serving.gateway.logprobs import chat_logprobs
from serving.gateway.ports import ServedModel, Services
from serving.gateway.request_context import context_of
from serving.gateway.sampling import resolve_sampling
from serving.gateway.schemas import ChatRequest, parse_chat
from serving.gateway.sse import ChunkWriter, usage_json
from serving.model.chat_format import ChatFormatError, ChatMessage


async def create_chat_completion(request: Request, services: Services, generations: Generations) -> Response:
    limits, context = services.settings.limits, context_of(request)
    model = services.readiness.require_model()
    asked = parse_chat(decode_body(await request.body()), limits)
    check_model_name(model, asked.model)
    shape = ChatShape(f"chatcmpl-{context.request_id}", model, int(time.time()), asked)
    turns = tuple(Turn(message.role, message.content) for message in asked.messages)

    # Before it is judged: what is too long for the model would cost a judgement without end.
    prompt_ids = await render(model, asked.messages)
    sampling = resolve_sampling(
        asked.sampling, model.defaults, len(prompt_ids), max_context(services, model), limits.max_tokens
    )
    moderation = Moderation(services, services.rules_of_key(key_name_of(request)), context.request_id)
    verdict = await moderation.judge_input(turns)
    turn = TurnContext(context.request_id, model, moderation, turns, verdict, tuple(prompt_ids))
    if moderation.refuses(verdict):
        return await refuse(services, shape, asked.stream, turn, asked.sampling.num_choices, "messages")

    salt = cache_salt(request, services)
    generation = generations.start(context, [prompt_ids], [sampling], asked.sampling.num_choices, salt)
    answer = Answer(generation, model.tokenizer, moderation, has_logprobs=shape.has_logprobs)
    return await respond(request, services, generation, answer, shape, asked.stream, turn)


async def render(model: ServedModel, messages: Sequence[ChatMessage]) -> list[int]:
    """Messages as token ids, by the checkpoint's own template."""
    chat_format = model.chat_format
    if chat_format is None:
        raise InvalidRequest(f"{model.model_id} has no chat template; use /v1/completions", param="model")
    num_characters = sum(len(message.content) for message in messages)
    try:
        return await tokenize(lambda: chat_format.render(messages), num_characters)
    except ChatFormatError as error:
        raise InvalidRequest(str(error), param="messages") from None


@dataclass(frozen=True, slots=True)
class ChatShape:
    """`chat.completion` objects and their chunks."""

    answer_id: str
    model: ServedModel
    created: int
    asked: ChatRequest

    @property
    def has_logprobs(self) -> bool:
        return self.asked.sampling.num_top_logprobs is not None

    def writer(self) -> ChunkWriter:
        return ChunkWriter(
            self._head("chat.completion.chunk"),
            is_chat=True,
            includes_usage=self.asked.stream.includes_usage,
            logprobs_of=self._logprobs if self.has_logprobs else None,
        )

    def opening(self, writer: ChunkWriter, index: int) -> bytes:
        return writer.role(index)

    def joined(self, choices: Sequence[ChoiceDelta], usage: Usage) -> JsonObject:
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_json(usage),
        }

    def _choice(self, choice: ChoiceDelta) -> JsonObject:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": choice.refusal},
            "logprobs": self._logprobs(choice) if self.has_logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, choice: ChoiceDelta) -> JsonObject:
        return chat_logprobs(choice.logprobs, self.model.tokenizer)

    def _head(self, kind: str) -> JsonObject:
        return {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model.model_id}
