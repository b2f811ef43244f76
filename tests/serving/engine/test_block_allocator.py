"""The allocator beside a plain twin, through random operations: nothing is owned twice, lost, or taken out of turn."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.engine.kv_blocks import BlockAllocator

pytestmark = pytest.mark.unit

NUM_BLOCKS = 12


@dataclass(eq=False)
class Holder:
    """What a sequence is to the allocator: its blocks in order, and the keys that their contents would have."""

    blocks: list[int] = field(default_factory=list[int])
    path: str = ""  # one letter a block; a block's key is the path up to it
    num_keyed: int = 0

    def key(self, index: int) -> bytes:
        return self.path[: index + 1].encode()


class AllocatorMachine(RuleBasedStateMachine):
    """The twin: who holds what, and in which order blocks were let go, as plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.holders: list[Holder] = []
        self.known: dict[bytes, int] = {}
        self.idle: list[int] = []  # let go longest ago first

    @initialize()
    def nothing_is_known(self) -> None:
        assert self.allocator.num_available == NUM_BLOCKS
        assert self.allocator.num_idle == 0

    @property
    def held(self) -> set[int]:
        return {block for holder in self.holders for block in holder.blocks}

    def num_available(self) -> int:
        return NUM_BLOCKS - len(self.held)

    @rule(path=st.text("ab", min_size=1, max_size=5))
    def begin(self, path: str) -> None:
        """As a sequence does: share what is known of its beginning, then take blocks for the rest."""
        holder = Holder(path=path)
        while len(holder.blocks) < len(path) and (block := self.known.get(holder.key(len(holder.blocks)))) is not None:
            assert self.allocator.find(holder.key(len(holder.blocks))) == block
            holder.blocks.append(block)
        holder.num_keyed = len(holder.blocks)
        self.allocator.share(holder.blocks)
        self.idle = [block for block in self.idle if block not in holder.blocks]
        self.holders.append(holder)
        missing = len(path) - len(holder.blocks)
        if missing > self.num_available():
            with pytest.raises(ValueError, match="available"):
                self.allocator.allocate(missing)
            holder.path = path[: len(holder.blocks)]
        else:
            self.take(holder, missing)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), letter=st.sampled_from("ab"))
    def grow(self, data: st.DataObject, letter: str) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        if self.num_available():
            holder.path += letter
            self.take(holder, 1)

    def take(self, holder: Holder, count: int) -> None:
        free = set(range(NUM_BLOCKS)) - self.held - set(self.idle)
        num_evicted = max(0, count - len(free))
        evicted, self.idle = self.idle[:num_evicted], self.idle[num_evicted:]
        self.known = {key: block for key, block in self.known.items() if block not in evicted}
        taken = self.allocator.allocate(count)
        assert taken == sorted(free | set(evicted))[:count]
        assert not self.held & set(taken)
        holder.blocks += taken

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        if holder.num_keyed < len(holder.blocks):
            key, block = holder.key(holder.num_keyed), holder.blocks[holder.num_keyed]
            is_first = key not in self.known
            assert self.allocator.remember(block, key) == is_first
            if is_first:
                self.known[key] = block
                holder.num_keyed += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.allocator.release(holder.blocks)
        for block in reversed(holder.blocks):
            if block not in self.held and block in self.known.values():
                self.idle.append(block)

    @rule()
    def forget(self) -> None:
        if not self.holders:
            self.allocator.forget_all()
            self.known, self.idle = {}, []

    @invariant()
    def counts_are_the_twins(self) -> None:
        for block in range(NUM_BLOCKS):
            assert self.allocator.num_holders(block) == sum(block in holder.blocks for holder in self.holders)
        assert self.allocator.num_idle == len(self.idle)
        assert self.allocator.num_available == self.num_available()

    @invariant()
    def a_block_with_two_holders_has_one_content(self) -> None:
        for holder in self.holders:
            for index, block in enumerate(holder.blocks):
                for other in self.holders:
                    if other is not holder and block in other.blocks:
                        assert other.blocks.index(block) == index
                        assert other.key(index) == holder.key(index)

    @invariant()
    def what_is_known_is_found_and_continues_what_is_known(self) -> None:
        for length in range(1, 3):
            for path in ("a" * length, "b" * length, "ab"[:length]):
                assert self.allocator.find(path.encode()) == self.known.get(path.encode())
        for key in self.known:
            assert len(key) == 1 or key[:-1] in self.known

    def teardown(self) -> None:
        for holder in self.holders:
            self.allocator.release(holder.blocks)
        assert self.allocator.num_available == NUM_BLOCKS
        assert sorted(self.allocator.allocate(NUM_BLOCKS)) == list(range(NUM_BLOCKS))
        assert self.allocator.num_idle == 0


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase
