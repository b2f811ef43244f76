"""All state of one sequence: one choice of a generate request, one score request or one pool request.

Counters are derived, so they cannot drift. Only the scheduler changes `blocks` and `num_cached`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.engine.adapters import Adapter
from serving.engine.detokenizer import Detokenizer
from serving.engine.kv_blocks import BLOCK_SIZE
from serving.engine.requests import FinishReason, GenerateRequest, PoolRequest, ScoreRequest, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    request: GenerateRequest | ScoreRequest | PoolRequest
    choice_index: int
    arrival: int  # running number; older sequences go first and are preempted last
    ids: list[int]  # prompt, then generated tokens
    num_prompt: int
    detokenizer: Detokenizer | None = None
    # The one loaded when the request came: its keys and values are of this version to the end.
    adapter: Adapter | None = None
    blocks: list[int] = field(default_factory=list[int])
    num_cached: int = 0  # leading ids whose keys and values are in the cache
    is_cancelled: bool = False
    finish_reason: FinishReason | None = None
    scored: list[TokenLogprob] = field(default_factory=list[TokenLogprob])  # of a score request, so far

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_pending(self) -> int:
        """Tokens to run before the next one can be sampled; 1 while decoding."""
        return len(self.ids) - self.num_cached

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def generated_ids(self) -> list[int]:
        return self.ids[self.num_prompt :]

    def slot_of(self, position: int) -> int:
        return self.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
