"""From what the client asked to what the engine is told: the model's defaults, then OpenAI's, and the room there is."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from serving.engine.requests import SamplingParams
from serving.errors import PromptTooLong
from serving.gateway.ports import GenerationDefaults
from serving.gateway.schemas import SamplingRequest

_SEED_MASK = 2**63 - 1


def random_seed() -> int:
    return secrets.randbits(63)


def resolve_sampling(
    asked: SamplingRequest,
    defaults: GenerationDefaults,
    num_prompt_tokens: int,
    max_context: int,
    max_tokens_limit: int,
    *,
    param: str = "messages",
    new_seed: Callable[[], int] = random_seed,
) -> SamplingParams:
    """Everything decided. Raises PromptTooLong when the prompt leaves no room for a single token."""
    top_p = _first(asked.top_p, defaults.top_p, 1.0)
    top_k = asked.top_k if asked.top_k is not None else defaults.top_k
    return SamplingParams(
        max_tokens=_room(asked.max_tokens, max_context, num_prompt_tokens, max_tokens_limit, param),
        temperature=_first(asked.temperature, defaults.temperature, 1.0),
        top_p=top_p or 1.0,
        top_k=1 if top_p == 0 else _positive(top_k),  # no nucleus at all is the most likely token
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=_first(asked.repetition_penalty, defaults.repetition_penalty, 1.0),
        seed=new_seed() if asked.seed is None else asked.seed & _SEED_MASK,
        stop=asked.stop,
        ignore_eos=asked.ignore_eos,
        num_top_logprobs=asked.num_top_logprobs,
    )


def _room(asked: int | None, max_context: int, num_prompt_tokens: int, max_tokens_limit: int, param: str) -> int:
    """`max_tokens` cut to what the context has left: asking for more ends in "length", not in an error."""
    left = max_context - num_prompt_tokens
    if left < 1:
        raise PromptTooLong(num_prompt_tokens, max_context - 1, param=param)
    return min(left, max_tokens_limit if asked is None else asked)


def _first(asked: float | None, default: float | None, otherwise: float) -> float:
    return asked if asked is not None else default if default is not None else otherwise


def _positive(top_k: int | None) -> int | None:
    return top_k if top_k is not None and top_k > 0 else None


def generation_defaults(config: dict[str, object]) -> GenerationDefaults:
    """The four values that generation_config.json may set; one of a wrong type counts as absent."""
    return GenerationDefaults(
        temperature=_number(config.get("temperature")),
        top_p=_number(config.get("top_p")),
        top_k=_integer(config.get("top_k")),
        repetition_penalty=_number(config.get("repetition_penalty")),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
