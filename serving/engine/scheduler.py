"""Which sequences run in the next step, and how many tokens of each.

Continuous batching: sequences join and leave at every step. Decoding sequences go first with one token each; what is
left of the step goes to prefill, oldest first, in chunks. Beside streams a chunk is as long as keeps the step within a
multiple of what the streams cost alone, by `step_cost.py`'s estimate, and at least one token: a long prompt slows the
others a little for longer, and still ends. A sequence that begins does not compute the full blocks that are known of
its beginning. When blocks run out the youngest sequence gives its own back and is computed again later (recompute
preemption), as far as they were needed meanwhile; the oldest always advances, so every accepted sequence ends. Knows
numbers only: no tensors, no clock.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace

from serving.engine.kv_blocks import BLOCK_SIZE, BlockAllocator, blocks_for
from serving.engine.prompt_lookup import MAX_GUESS
from serving.engine.sequence import Sequence
from serving.engine.step_cost import StepCost

# With more rows a step is bound by its products, not by reading the weights: a guessed row costs what it saves.
_MAX_GUESSING = 4


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Operator's limits of one engine."""

    max_running: int = 64
    max_waiting: int = 256
    max_step_tokens: int = 256  # of one step over all sequences, decoding ones first
    # Prompts make a step at most this many times what its streams cost alone, by estimate. None: streams may wait.
    prefill_slowdown: float | None = 2.5

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.prefill_slowdown is not None and self.prefill_slowdown <= 1:
            raise ValueError(f"prefill_slowdown must be above 1, got {self.prefill_slowdown}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` .. `start + num_tokens` of one sequence, from its first uncached one.

    The last of them may be guessed ones, which are not (yet) the sequence's.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    guess: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def ids(self) -> list[int]:
        return [*self.sequence.ids[self.start : self.end], *self.guess]

    @property
    def is_last(self) -> bool:
        """The chunk reaches the sequence's last id: the next token can be drawn from it."""
        return self.end >= len(self.sequence.ids)


class _Room:
    """What one step has left for prompts: tokens, and beside streams what they may cost."""

    def __init__(self, limits: EngineLimits, step_cost: StepCost, decoding: list[Sequence]) -> None:
        self.num_tokens = limits.max_step_tokens
        self._step_cost = step_cost
        self._cost: float | None = None
        self._has_prompt = False
        if decoding and limits.prefill_slowdown is not None:
            alone = step_cost.of_streams([len(sequence.ids) for sequence in decoding])
            self._cost = (limits.prefill_slowdown - 1) * alone

    def tokens_for(self, start: int, num_pending: int) -> int:
        """How many tokens from `start` on fit. The first prompt asked for gets one whatever it costs, so it ends."""
        num_tokens = min(num_pending, self.num_tokens)
        if self._cost is None:
            return num_tokens
        return min(num_tokens, max(self._step_cost.prompt_tokens_within(self._cost, start), not self._has_prompt))

    def take(self, start: int, num_tokens: int) -> None:
        self.num_tokens -= num_tokens
        self._has_prompt = True
        if self._cost is not None:
            self._cost -= self._step_cost.of_prompt(start, num_tokens)


class Scheduler:
    """step_cost: of the model that runs the steps; without one, attention counts nothing."""

    def __init__(self, allocator: BlockAllocator, limits: EngineLimits, step_cost: StepCost | None = None) -> None:
        self.allocator = allocator
        self.limits = limits
        self.step_cost = step_cost or StepCost(position_share=0.0)
        self.waiting: list[Sequence] = []  # by arrival, like `running`: oldest first
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        # Of those waiting: the cache has room, but their beginning is just being computed, or the step is full.
        self.num_awaiting_turn = 0

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
        num_preemptions = self.num_preemptions
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_pending > 1]
        room = _Room(self.limits, self.step_cost, decoding)
        for sequence in decoding:
            if room.num_tokens > 0 and self._reserve(sequence, 1):
                chunks.append(Chunk(sequence, sequence.num_cached, 1))
                room.num_tokens -= 1
        for sequence in prefilling:
            num_tokens = room.tokens_for(sequence.num_cached, sequence.num_pending)
            if num_tokens > 0 and self._reserve(sequence, num_tokens):
                chunks.append(Chunk(sequence, sequence.num_cached, num_tokens))
                room.take(sequence.num_cached, num_tokens)
        self.num_awaiting_turn = 0
        # A sequence preempted in this step waits for the next one: its old chunk must not meet its new blocks.
        if self.num_preemptions == num_preemptions:
            chunks += self._admit(room)
        # A sequence planned early in this step may have lost its blocks to an older one planned after it.
        chunks = self._add_guesses([chunk for chunk in chunks if chunk.sequence.blocks])
        return sorted(chunks, key=lambda chunk: chunk.sequence.arrival)

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks' keys and values are in the cache now; blocks that are full can be shared."""
        for chunk in chunks:
            chunk.sequence.num_cached = chunk.end - len(chunk.guess)
            self._offer(chunk.sequence)

    def accept(self, sequence: Sequence, num_guessed: int) -> None:
        """The first guessed tokens of its chunk are the sequence's now; their keys and values are in the cache."""
        sequence.num_cached += num_guessed
        self._offer(sequence)

    def _admit(self, room: _Room) -> list[Chunk]:
        """Begin waiting sequences while they fit whole, beside what those that run will need."""
        chunks: list[Chunk] = []
        waiting = list(self.waiting)
        for index, sequence in enumerate(waiting):
            # Those that run have had a token each of this step's: there are never more of them than a step has tokens.
            if len(self.running) >= self.limits.max_running:
                break
            if room.num_tokens < 1:
                self.num_awaiting_turn += len(waiting) - index
                break
            prefix = self._find_prefix(sequence)
            if self._is_being_computed(sequence, len(prefix)):
                self.num_awaiting_turn += 1
                continue
            # A block that somebody holds already costs nothing.
            num_shared = sum(self.allocator.num_holders(block) > 0 for block in prefix)
            needed = blocks_for(len(sequence.ids) + 1) - num_shared
            if self.running and needed > self.allocator.num_available - self._num_promised():
                break
            start = len(prefix) * BLOCK_SIZE
            num_tokens = room.tokens_for(start, len(sequence.ids) - start)
            if num_tokens < 1:
                self.num_awaiting_turn += len(waiting) - index
                break
            self._begin(sequence, prefix)
            if not self._reserve(sequence, num_tokens):
                break
            chunks.append(Chunk(sequence, start, num_tokens))
            room.take(start, num_tokens)
        return chunks

    def _add_guesses(self, chunks: list[Chunk]) -> list[Chunk]:
        """Guesses take what nobody else needs: tokens that the step has left, and room in blocks that are there."""
        if len(chunks) > _MAX_GUESSING:
            return chunks
        budget = self.limits.max_step_tokens - sum(chunk.num_tokens for chunk in chunks)
        return [self._with_guess(chunk, budget // len(chunks)) for chunk in chunks]

    def _with_guess(self, chunk: Chunk, budget: int) -> Chunk:
        sequence = chunk.sequence
        if sequence.lookup is None or chunk.num_tokens > 1 or not chunk.is_last:
            return chunk
        room = len(sequence.blocks) * BLOCK_SIZE - chunk.end
        guess = sequence.lookup.guess(sequence.ids, min(MAX_GUESS, budget, room))
        return replace(chunk, num_tokens=1 + len(guess), guess=tuple(guess))

    def _begin(self, sequence: Sequence, prefix: list[int]) -> None:
        """Move a waiting sequence to running, with the blocks of its beginning that are known."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        self.allocator.share(prefix)
        sequence.blocks = list(prefix)
        sequence.num_keyed = len(prefix)
        sequence.num_cached = len(prefix) * BLOCK_SIZE
        if sequence.num_reused is None:
            sequence.num_reused = sequence.num_cached

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """The longest chain of known blocks that the sequence begins with."""
        prefix: list[int] = []
        if sequence.root_key is not None:
            for index in range(sequence.num_reusable // BLOCK_SIZE):
                block = self.allocator.find(sequence.key_of(index))
                if block is None:
                    break
                prefix.append(block)
        return prefix

    def _is_being_computed(self, sequence: Sequence, block_index: int) -> bool:
        """A running sequence is about to fill the very block that this one needs next: waiting saves computing it."""
        if sequence.root_key is None or block_index >= sequence.num_reusable // BLOCK_SIZE:
            return False
        key = sequence.key_of(block_index)
        return any(
            other.root_key is not None
            and other.num_cached // BLOCK_SIZE <= block_index < len(other.ids) // BLOCK_SIZE
            and other.key_of(block_index) == key
            for other in self.running
        )

    def _num_promised(self) -> int:
        """Blocks that running sequences will take: of their prompts the rest, and one each for what they generate."""
        return sum(max(1, blocks_for(len(item.ids) + 1) - len(item.blocks)) for item in self.running)

    def _offer(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full.

        A block is offered only after all those before it, so that chains have no gaps: a sequence that has computed
        what another offers already keeps the rest for itself.
        """
        if sequence.root_key is None:
            return
        while sequence.num_keyed < sequence.num_cached // BLOCK_SIZE:
            index = sequence.num_keyed
            if not self.allocator.remember(sequence.blocks[index], sequence.key_of(index)):
                return
            sequence.num_keyed += 1

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for `num_tokens` more, preempting younger ones if it must."""
        if sequence not in self.running:
            return False
        missing = blocks_for(sequence.num_cached + num_tokens) - len(sequence.blocks)
        while missing > self.allocator.num_available:
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
        """Take its blocks; what is left of them when it runs again is not computed again."""
        self.num_preemptions += 1
        self._release(sequence)
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=_arrival)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_keyed = 0
        sequence.num_cached = 0


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
