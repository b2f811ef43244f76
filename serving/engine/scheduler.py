"""Which sequences run in the next step, and how many tokens of each.

Continuous batching: sequences join and leave at every step. Decoding sequences go first with one token each; what is
left of the step's token budget goes to prefill, oldest first, in chunks, so a long prompt does not stall the streams of
others. When blocks run out the youngest sequence gives its blocks back and is computed again later (recompute
preemption); the oldest always advances, so every accepted sequence ends. Knows integers only: no tensors, no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from serving.engine.kv_blocks import BlockAllocator, blocks_for
from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Operator's limits of one engine."""

    max_running: int = 64
    max_waiting: int = 256
    # Tokens of one step over all sequences, decoding ones first: bounds how long a prefill chunk stalls others.
    max_step_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` .. `start + num_tokens` of one sequence, from its first uncached one."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """The chunk ends at the sequence's last id: the next token can be drawn from it."""
        return self.end == len(self.sequence.ids)


class Scheduler:
    def __init__(self, allocator: BlockAllocator, limits: EngineLimits) -> None:
        self.allocator = allocator
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival, oldest first
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and take its blocks back."""
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> list[Chunk]:
        """The next step, oldest sequence first; blocks for every planned token are allocated on return."""
        chunks: list[Chunk] = []
        budget = self.limits.max_step_tokens
        num_preemptions = self.num_preemptions
        for sequence in list(self.running):
            if sequence.num_pending == 1 and budget > 0 and self._reserve(sequence, 1):
                chunks.append(Chunk(sequence, sequence.num_cached, 1))
                budget -= 1
        for sequence in list(self.running):
            if sequence.num_pending > 1 and budget > 0:
                num_tokens = min(sequence.num_pending, budget)
                if self._reserve(sequence, num_tokens):
                    chunks.append(Chunk(sequence, sequence.num_cached, num_tokens))
                    budget -= num_tokens
        # A sequence preempted in this step waits for the next one: its old chunk must not meet its new blocks.
        for sequence in self._admit(budget if self.num_preemptions == num_preemptions else 0):
            num_tokens = min(sequence.num_pending, budget)
            if not self._reserve(sequence, num_tokens):
                break
            chunks.append(Chunk(sequence, sequence.num_cached, num_tokens))
            budget -= num_tokens
        # A sequence planned early in this step may have lost its blocks to an older one planned after it.
        chunks = [chunk for chunk in chunks if chunk.sequence.blocks]
        return sorted(chunks, key=lambda chunk: chunk.sequence.arrival)

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks' keys and values are in the cache now."""
        for chunk in chunks:
            chunk.sequence.num_cached = chunk.end

    def _admit(self, budget: int) -> list[Sequence]:
        """Move waiting sequences to running while they fit whole, beside the growth of those that run."""
        admitted: list[Sequence] = []
        # One block a running sequence stays free: each may cross a block border before any ends.
        num_free = self.allocator.num_free - len(self.running)
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            needed = blocks_for(len(sequence.ids) + 1)
            if needed > num_free and self.running:
                break
            num_free -= needed
            budget -= sequence.num_pending
            admitted.append(self.waiting.popleft())
            self.running.append(sequence)
        self.running.sort(key=lambda item: item.arrival)
        return admitted

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for `num_tokens` more, preempting younger ones if it must."""
        if sequence not in self.running:
            return False
        missing = blocks_for(sequence.num_cached + num_tokens) - len(sequence.blocks)
        while missing > self.allocator.num_free:
            youngest = self.running[-1]
            if youngest is sequence:
                if len(self.running) > 1:
                    self._preempt(sequence)
                return False
            self._preempt(youngest)
        if missing > 0:
            sequence.blocks.extend(self.allocator.allocate(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._release(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_cached = 0
