"""All state of one sequence: one choice of a generate request, one score request or one pool request.

Counters are derived, so they cannot drift. Only the scheduler changes `blocks` and the three counters below it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.engine.adapters import Adapter
from serving.engine.detokenizer import Detokenizer
from serving.engine.kv_blocks import BLOCK_SIZE
from serving.engine.prefix_keys import block_key
from serving.engine.prompt_lookup import PromptLookup
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
    num_keyed: int = 0  # leading blocks that others can find and share
    num_reused: int | None = None  # prompt tokens that were in the cache when it first ran; None: it has not run
    # What the keys of its blocks begin with; None: it neither finds nor offers any.
    root_key: bytes | None = None
    is_cancelled: bool = False
    finish_reason: FinishReason | None = None
    scored: list[TokenLogprob] = field(default_factory=list[TokenLogprob])  # of a score request, so far
    lookup: PromptLookup | None = None  # where it guesses what comes next
    _keys: list[bytes] = field(default_factory=list[bytes])

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

    @property
    def num_reusable(self) -> int:
        """Leading ids that need no computing where their keys and values are known.

        Not the last id, whose row is wanted; and of a score request, which wants every row, only those it has had.
        """
        if isinstance(self.request, ScoreRequest):
            return min(len(self.scored), len(self.ids) - 1)
        return len(self.ids) - 1

    def key_of(self, block_index: int) -> bytes:
        """The key of a block that `ids` fill."""
        assert self.root_key is not None
        while len(self._keys) <= block_index:
            start = len(self._keys) * BLOCK_SIZE
            parent = self._keys[-1] if self._keys else self.root_key
            self._keys.append(block_key(parent, self.ids[start : start + BLOCK_SIZE]))
        return self._keys[block_index]

    def slot_of(self, position: int) -> int:
        return self.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
