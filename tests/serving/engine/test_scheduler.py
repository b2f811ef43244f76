"""The scheduler through random arrivals, answers and cancellations, with a cache of words instead of numbers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.engine.kv_blocks import BLOCK_SIZE, BlockAllocator
from serving.engine.prefix_keys import root_key
from serving.engine.prompt_lookup import PromptLookup
from serving.engine.requests import GenerateRequest, PoolRequest, SamplingParams, ScoreRequest, TokenLogprob
from serving.engine.scheduler import Chunk, EngineLimits, Scheduler
from serving.engine.sequence import Sequence
from serving.engine.step_cost import StepCost

pytestmark = pytest.mark.unit

NUM_BLOCKS = 9
MAX_CONTEXT = NUM_BLOCKS * BLOCK_SIZE
SALTS = ("", "x")


class SchedulerMachine(RuleBasedStateMachine):
    """Each slot holds what the model would have put there: a function of the salt and all ids up to its position.

    Whatever a chunk attends to is compared with the sequence's own ids: content of another prompt, of a block that was
    taken back, or of one that was never written would show.
    """

    def __init__(self) -> None:
        super().__init__()
        limits = EngineLimits(max_running=5, max_waiting=20, max_step_tokens=20)
        self.scheduler = RecordingScheduler(BlockAllocator(NUM_BLOCKS), limits)
        self.slots: dict[int, int] = {}
        self.sequences: list[Sequence] = []
        self.num_arrived = 0

    @rule(
        kinds=st.lists(st.sampled_from(["generate", "generate", "score", "pool"]), min_size=1, max_size=4),
        parts=st.lists(st.sampled_from([0, 1]), max_size=4),
        rest=st.integers(1, BLOCK_SIZE),
        salt=st.sampled_from(SALTS),
        guesses=st.booleans(),
    )
    def arrive(self, kinds: list[str], parts: list[int], rest: int, salt: str, *, guesses: bool) -> None:
        ids = [part for part in parts for _ in range(BLOCK_SIZE)] + [2] * rest
        for kind in kinds:
            self.num_arrived += 1
            sequence = sequence_of(self.num_arrived, list(ids), kind, root=root_key(0, None, salt))
            self.sequences.append(sequence)
            self.salts[sequence] = salt
            sequence.lookup = PromptLookup() if guesses and kind == "generate" else None
            self.scheduler.add(sequence)

    @property
    def salts(self) -> dict[Sequence, str]:
        return self.scheduler.salts

    @precondition(lambda self: len(self.sequences) > 4)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(self.sequences)))

    @precondition(lambda self: self.sequences)
    @rule(count=st.integers(1, 25), word=st.sampled_from([0, 1]))
    def step(self, count: int, word: int) -> None:
        for _ in range(count):
            self.step_once(word)

    def step_once(self, word: int) -> None:
        chunks = self.scheduler.plan()
        assert bool(chunks) == bool(self.sequences)
        assert sum(chunk.num_tokens for chunk in chunks) <= self.scheduler.limits.max_step_tokens
        if self.scheduler.running:
            oldest = self.scheduler.running[0]
            assert any(chunk.sequence is oldest for chunk in chunks)
        self.write(chunks)
        self.scheduler.commit(chunks)
        for chunk in chunks:
            self.advance(chunk, word)

    def write(self, chunks: list[Chunk]) -> None:
        written: set[int] = set()
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.num_tokens >= 1
            ids = [*sequence.ids, *chunk.guess]
            assert chunk.ids == ids[chunk.start : chunk.end]
            contents = self.contents(sequence, ids)
            for position in range(chunk.start, chunk.end):
                slot = sequence.slot_of(position)
                assert slot not in written
                assert self.scheduler.allocator.num_holders(slot // BLOCK_SIZE) == 1
                written.add(slot)
                self.slots[slot] = contents[position]
        for chunk in chunks:
            contents = self.contents(chunk.sequence, [*chunk.sequence.ids, *chunk.guess])
            found = [self.slots[chunk.sequence.slot_of(position)] for position in range(chunk.end)]
            assert found == contents[: chunk.end]

    def contents(self, sequence: Sequence, ids: list[int]) -> list[int]:
        """A hash for every position."""
        contents: list[int] = []
        for token_id in ids:
            contents.append(hash((contents[-1] if contents else self.salts[sequence], token_id)))
        return contents

    def advance(self, chunk: Chunk, word: int) -> None:
        sequence = chunk.sequence
        if isinstance(sequence.request, ScoreRequest):
            assert chunk.start <= len(sequence.scored)
            num_scored = min(chunk.end, len(sequence.ids) - 1)
            sequence.scored += [TokenLogprob(0, 0.0, [])] * (num_scored - len(sequence.scored))
        if not chunk.is_last:
            return
        if isinstance(sequence.request, ScoreRequest):
            assert len(sequence.scored) == len(sequence.ids) - 1
        if isinstance(sequence.request, GenerateRequest):
            num_right = next((i for i, guessed in enumerate(chunk.guess) if guessed != word), len(chunk.guess))
            sequence.ids += [word] * (num_right + 1)
            self.scheduler.accept(sequence, num_right)
            assert sequence.num_pending == 1
            if sequence.num_generated < 40 and len(sequence.ids) < MAX_CONTEXT - 4:
                return
        self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.sequences.remove(sequence)

    @invariant()
    def every_holder_is_counted(self) -> None:
        allocator = self.scheduler.allocator
        held: dict[int, int] = {}
        for sequence in self.sequences:
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        assert [allocator.num_holders(block) for block in range(NUM_BLOCKS)] == [
            held.get(block, 0) for block in range(NUM_BLOCKS)
        ]
        assert allocator.num_available == NUM_BLOCKS - len(held)

    @invariant()
    def both_queues_are_by_arrival(self) -> None:
        for queue in (self.scheduler.running, self.scheduler.waiting):
            assert [s.arrival for s in queue] == sorted(s.arrival for s in queue)
        assert set(self.scheduler.running) | set(self.scheduler.waiting) == set(self.sequences)
        assert all(not sequence.blocks for sequence in self.scheduler.waiting)

    def teardown(self) -> None:
        for _ in range(3000):
            if not self.sequences:
                break
            self.step_once(0)
        assert not self.scheduler.has_work
        allocator = self.scheduler.allocator
        assert allocator.num_available == NUM_BLOCKS
        assert sorted(allocator.allocate(NUM_BLOCKS)) == list(range(NUM_BLOCKS))


class RecordingScheduler(Scheduler):
    """Checks that who is preempted is the youngest of those that run."""

    def __init__(self, allocator: BlockAllocator, limits: EngineLimits) -> None:
        super().__init__(allocator, limits)
        self.salts: dict[Sequence, str] = {}

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.arrival == max(other.arrival for other in self.running)
        super()._preempt(sequence)


SchedulerMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def sequence_of(arrival: int, ids: list[int], kind: str = "pool", *, root: bytes = b"") -> Sequence:
    name = str(arrival)
    request: GenerateRequest | ScoreRequest | PoolRequest
    if kind == "generate":
        request = GenerateRequest(request_id=name, prompt_ids=ids, sampling=SamplingParams(max_tokens=1, seed=0))
    else:
        request = (ScoreRequest if kind == "score" else PoolRequest)(request_id=name, ids=ids)
    return Sequence(request, 0, arrival, ids, len(ids), root_key=root)


def test_the_youngest_gives_way_and_is_the_first_to_come_back() -> None:
    scheduler = Scheduler(BlockAllocator(4), EngineLimits())
    sequences = [sequence_of(number, [number] * 15) for number in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.commit(scheduler.plan())
    assert scheduler.running == sequences[:2]  # a third would leave no block for the others to grow into
    for sequence in sequences[:2]:
        sequence.ids += [9] * 18
    scheduler.commit(scheduler.plan())
    assert scheduler.running == sequences[:1]
    assert scheduler.waiting == sequences[1:]
    assert scheduler.num_preemptions == 1


def test_no_more_sequences_run_than_a_step_has_tokens() -> None:
    """Else the youngest would get none for as long as the oldest go on."""
    scheduler = Scheduler(BlockAllocator(64), EngineLimits(max_step_tokens=4))
    for number in range(10):
        scheduler.add(sequence_of(number, [number] * 3))
    for _ in range(12):
        chunks = scheduler.plan()
        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.is_last:
                chunk.sequence.ids.append(1)
    assert len(scheduler.running) == 4
    assert len(scheduler.plan()) == 4


def steps_of_prompt(scheduler: Scheduler, contexts: list[int], prompt: int) -> list[tuple[float, int]]:
    """Of every step until a long prompt is computed: its cost over the streams' alone, and its tokens of the prompt."""
    streams = [sequence_of(number, [number] * length) for number, length in enumerate(contexts)]
    for sequence in streams:
        scheduler.add(sequence)
    while any(sequence.num_pending for sequence in streams):
        scheduler.commit(scheduler.plan())
    long = sequence_of(100, [100] * prompt)
    scheduler.add(long)
    found: list[tuple[float, int]] = []
    while long.num_pending:
        for sequence in streams:
            sequence.ids.append(1)
        chunks = scheduler.plan()
        assert [chunk.sequence for chunk in chunks] == [*streams, long]
        alone = scheduler.step_cost.of_streams([len(sequence.ids) for sequence in streams])
        added = scheduler.step_cost.of_prompt(chunks[-1].start, chunks[-1].num_tokens)
        found.append((1 + added / alone, chunks[-1].num_tokens))
        scheduler.commit(chunks)
    return found


@pytest.mark.parametrize("num_streams", [1, 8, 60])
def test_a_prompt_beside_streams_stays_within_the_limit_and_uses_it(num_streams: int) -> None:
    limits = EngineLimits(max_step_tokens=1000, prefill_slowdown=2.5)
    scheduler = Scheduler(BlockAllocator(1000), limits, StepCost(position_share=1e-5))
    steps = steps_of_prompt(scheduler, [20] * num_streams, 3000)
    assert all(ratio <= 2.5 for ratio, _ in steps)
    assert all(ratio > 2.2 for ratio, _ in steps[:-1])


def test_more_streams_and_longer_ones_leave_a_prompt_more_tokens_a_step_and_depth_fewer() -> None:
    def steps(contexts: list[int]) -> list[int]:
        scheduler = Scheduler(BlockAllocator(2000), EngineLimits(), StepCost(position_share=3e-4))
        return [num_tokens for _, num_tokens in steps_of_prompt(scheduler, contexts, 2000)]

    assert steps([20])[0] < steps([20] * 8)[0] < steps([2000] * 8)[0]
    assert steps([20] * 8)[:-1] == sorted(steps([20] * 8)[:-1], reverse=True)


@pytest.mark.parametrize("position_share", [0.0, 0.01, 1e9])
def test_a_long_prompt_advances_every_step_whatever_it_costs(position_share: float) -> None:
    limits = EngineLimits(prefill_slowdown=1.001)
    scheduler = Scheduler(BlockAllocator(200), limits, StepCost(position_share))
    assert len(steps_of_prompt(scheduler, [20, 20], 500)) <= 500


def test_without_streams_or_without_a_limit_a_prompt_takes_whole_steps() -> None:
    alone = Scheduler(BlockAllocator(200), EngineLimits(), StepCost(0.01))
    assert [num_tokens for _, num_tokens in steps_of_prompt(alone, [], 600)] == [256, 256, 88]
    free = Scheduler(BlockAllocator(200), EngineLimits(prefill_slowdown=None), StepCost(0.01))
    assert [num_tokens for _, num_tokens in steps_of_prompt(free, [20] * 6, 600)] == [250, 250, 100]


def test_a_limit_that_leaves_prompts_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="prefill_slowdown must be above 1, got 1"):
        EngineLimits(prefill_slowdown=1.0)


def test_a_preempted_sequence_comes_back_to_the_blocks_that_nobody_needed() -> None:
    scheduler = Scheduler(BlockAllocator(6), EngineLimits(prefill_slowdown=None))
    older, younger = sequence_of(1, [1] * 15), sequence_of(2, [2] * 40)
    scheduler.add(older)
    scheduler.add(younger)
    scheduler.commit(scheduler.plan())
    older.ids += [1] * 40  # 4 blocks in all, beside 3: the younger one's last must go
    younger.ids.append(2)
    scheduler.commit(scheduler.plan())
    assert scheduler.waiting == [younger]
    scheduler.remove(older)
    (chunk,) = scheduler.plan()
    assert (chunk.sequence, chunk.start) == (younger, 32)
    assert younger.num_reused == 0  # what it had computed itself was not there before it


def test_a_small_sequence_does_not_pass_a_large_one_that_waits_for_room() -> None:
    scheduler = Scheduler(BlockAllocator(6), EngineLimits())
    running, large, small = sequence_of(1, [1] * 15), sequence_of(2, [2] * 70), sequence_of(3, [3] * 15)
    scheduler.add(running)
    scheduler.commit(scheduler.plan())
    running.ids.append(1)
    for sequence in (large, small):
        scheduler.add(sequence)
    scheduler.commit(scheduler.plan())
    assert (scheduler.running, scheduler.waiting) == ([running], [large, small])
