"""What a step costs by estimate, in rows: 1 is what the products of one more prompt token take.

The scheduler keeps prompts beside running streams within a multiple of what the streams cost alone. An estimate, not a
clock: what is planned depends on the requests only, so a run can be repeated. The constants are measured
(`benchmarks/gaps.py` says how well they hold); how attention compares to products follows from the model's form.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.model.spec import DecoderSpec

# Reading the weights once, which one row pays as well as ten; and what a stream adds: its row, its head, its draw.
_STEP = 8.0
_STREAM = 2.0
# An operation of attention beside one of the products, which have packed weights and many rows at once. What a
# sequence's keys and values cost to fetch and lay out is paid once, however many rows it has in the step.
_ATTEND = 3.0
_FETCH = 10.0


@dataclass(frozen=True, slots=True)
class StepCost:
    """position_share: operations of attention over one position, as a share of one row's products."""

    position_share: float

    @classmethod
    def of(cls, spec: DecoderSpec) -> StepCost:
        attention = 2 * spec.num_heads * spec.head_dim
        qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        products = spec.hidden_size * (qkv + spec.num_heads * spec.head_dim + 3 * spec.intermediate_size)
        return cls(attention / products)

    def of_streams(self, contexts: list[int]) -> float:
        """A step with one token of each of these sequences and nothing else. contexts: tokens each attends to."""
        return _STEP + sum(_STREAM + (_ATTEND + _FETCH) * self.position_share * context for context in contexts)

    def of_prompt(self, start: int, num_tokens: int) -> float:
        """What a prompt's chunk adds to a step: it attends to `start` tokens before it."""
        return num_tokens * self._row_at(start) + _FETCH * self.position_share * start

    def prompt_tokens_within(self, cost: float, start: int) -> int:
        """The most tokens of a chunk that adds no more than `cost`; 0 where one is too many."""
        return max(0, int((cost - _FETCH * self.position_share * start) / self._row_at(start)))

    def _row_at(self, start: int) -> float:
        return 1.0 + _ATTEND * self.position_share * start
