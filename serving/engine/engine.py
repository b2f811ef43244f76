"""The engine: a synchronous library that runs generate, score and pool requests in one batch.

`submit`, `cancel`, and `step() -> StepReport` until `has_work` is false. It takes its model by reference and knows no
sockets, clocks or threads: `process.py` serves it, training calls it in-process on live weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats.checkpoint_names import CheckpointNames
from serving.engine.adapters import Adapter
from serving.engine.detokenizer import Detokenizer
from serving.engine.kv_blocks import BLOCK_SIZE, BlockAllocator, KVCache, KVLayout
from serving.engine.prefix_keys import root_key
from serving.engine.prepare import PreparedModel
from serving.engine.prompt_lookup import PromptLookup
from serving.engine.requests import (
    CancelRequest,
    EngineEvent,
    EngineRequest,
    EngineStats,
    FinishReason,
    GenerateRequest,
    PoolEvent,
    PoolRequest,
    ScoreEvent,
    ScoreRequest,
    StepReport,
    TokenEvent,
    TokenLogprob,
)
from serving.engine.runner import run_chunks
from serving.engine.sampler import SamplingRow, sample, token_logprobs
from serving.engine.scheduler import Chunk, EngineLimits, Scheduler
from serving.engine.sequence import Sequence as EngineSequence
from serving.engine.step_cost import StepCost
from serving.errors import InvalidRequest, PromptTooLong, QueueFull
from serving.model.tokenizer import ModelTokenizer

__all__ = ["Engine", "EngineLimits"]

# Rows of logits held at once while scoring: 64 rows of a 150k vocabulary are 38 MB.
_SCORE_ROWS = 64


class Engine:
    """Continuous batching over a paged KV cache.

    kv_bytes:  budget of the cache; what is left of it after whole blocks is not used.
    tokenizer: needed for text and stop strings; without one, events carry ids only and end-of-turn is `eos_ids`.
    prefix_cache: a request does not compute what an earlier one with the same beginning, adapter and salt has left.
    prompt_lookup: sequences guess what comes next from what they have said; see `prompt_lookup.py`.
    int8_kv: keys and values are kept as int8, in about half of the memory. Not for an exact model.
    names:     of the modules in the checkpoint, which adapters may use; without them, the decoder's own.
    """

    def __init__(
        self,
        model: PreparedModel,
        *,
        kv_bytes: int,
        tokenizer: ModelTokenizer | None,
        limits: EngineLimits | None = None,
        eos_ids: frozenset[int] | None = None,
        prefix_cache: bool = True,
        prompt_lookup: bool = False,
        int8_kv: bool = False,
        names: CheckpointNames | None = None,
    ) -> None:
        if int8_kv and model.is_exact:
            raise ValueError("an exact model rounds nothing, so its KV cache cannot be int8")
        layout = KVLayout.of(model.spec, model.dtype, is_int8=int8_kv)
        num_blocks = kv_bytes // layout.block_bytes
        if num_blocks < 2:
            raise CheckpointError(
                f"a KV cache of {kv_bytes:,} bytes holds {num_blocks} blocks of {BLOCK_SIZE} tokens; "
                f"give it at least {2 * layout.block_bytes:,} bytes"
            )
        self.model = model
        self.limits = limits or EngineLimits()
        self.max_context = min(model.spec.max_positions, num_blocks * BLOCK_SIZE)
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids if eos_ids is not None else (tokenizer.eos_ids if tokenizer else frozenset[int]())
        self._cache = KVCache(layout, num_blocks)
        self._scheduler = Scheduler(BlockAllocator(num_blocks), self.limits, StepCost.of(model.spec))
        self._sequences: dict[str, list[EngineSequence]] = {}
        self._names = names or CheckpointNames()
        self._adapters: dict[str, Adapter] = {}
        self._heads: dict[str, Tensor] = {}
        self._has_prefix_cache = prefix_cache
        self._has_prompt_lookup = prompt_lookup
        self._model_version = 0
        self._num_arrived = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_reused_tokens = 0
        self._num_generated_tokens = 0
        self._num_guessed_tokens = 0
        self._num_guessed_right = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def kernel_name(self) -> str:
        return self.model.kernel_name

    def set_adapter(self, name: str, tensors: Mapping[str, Tensor], version: int) -> None:
        """Add or replace a low-rank adapter, by a copy. A request keeps to the end the version it was submitted with.

        tensors: see `Adapter.from_tensors`. `version` must rise each time. Raises CheckpointError for tensors that do
        not fit the model, ValueError for a version that does not rise.
        """
        loaded = self._adapters.get(name)
        if loaded is not None and version <= loaded.version:
            raise ValueError(
                f"adapter {name!r} is at version {loaded.version}; a new one must be higher, got {version}"
            )
        adapter = Adapter.from_tensors(name, tensors, version, self.model.dtype, self._names)
        adapter.check_fits(self.model.linear_shapes())
        self._adapters[name] = adapter

    def replace_model(self, model: PreparedModel) -> None:
        """Go on with other weights of the same form. Adapters and heads stay; what is cached is forgotten.

        Raises RuntimeError while a request is in progress: its keys and values are the old weights'. ValueError if
        the form or the type differs.
        """
        if self.has_work:
            raise RuntimeError("the model cannot be replaced while requests are in progress; step until none are left")
        if (model.spec, model.dtype) != (self.model.spec, self.model.dtype):
            raise ValueError(
                f"the engine runs {self.model.spec} in {self.model.dtype}; "
                f"the new model is {model.spec} in {model.dtype}"
            )
        self.model = model
        self._model_version += 1
        self._scheduler.allocator.forget_all()

    def set_head(self, name: str, weight: Tensor) -> None:
        """Add or replace a head of `pool` requests. weight: (outputs, hidden)."""
        if weight.dim() != 2 or weight.shape[1] != self.model.spec.hidden_size:
            raise ValueError(
                f"head {name!r} must be (outputs, {self.model.spec.hidden_size}), got {tuple(weight.shape)}"
            )
        self._heads[name] = weight.detach().to(torch.float32)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest, PromptTooLong or QueueFull; once accepted it will end in an event."""
        self._check(request)
        is_generate = isinstance(request, GenerateRequest)
        sequences = [self._new_sequence(request, i) for i in range(request.num_choices if is_generate else 1)]
        self._sequences[request.request_id] = sequences
        for sequence in sequences:
            self._scheduler.add(sequence)

    def cancel(self, request: CancelRequest) -> None:
        """Mark for the next step, also in the middle of prefill. Unknown or finished requests are ignored."""
        for sequence in self._sequences.get(request.request_id, []):
            if request.choice_index is None or request.choice_index == sequence.choice_index:
                sequence.is_cancelled = True

    @torch.inference_mode()
    def step(self) -> StepReport:
        """Run one step: drop what was cancelled, schedule, forward, sample, commit."""
        events, freed = self._drop_cancelled()
        chunks = self._scheduler.plan()
        if chunks:
            hidden = self._forward(chunks)
            self._scheduler.commit(chunks)
            events += self._finish_scores(chunks, hidden)
            events += self._finish_pools(chunks, hidden)
            events += self._sample(chunks, hidden)
        self._num_steps += 1
        return StepReport(events=events, stats=self.stats(freed))

    def stats(self, freed_request_ids: Sequence[str] = ()) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_awaiting_turn=scheduler.num_awaiting_turn,
            num_free_blocks=scheduler.allocator.num_available,
            num_total_blocks=scheduler.allocator.num_blocks,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_idle_blocks=scheduler.allocator.num_idle,
            num_reused_tokens=self._num_reused_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_guessed_tokens=self._num_guessed_tokens,
            num_guessed_right=self._num_guessed_right,
            freed_request_ids=list(freed_request_ids),
        )

    def _check(self, request: EngineRequest) -> None:
        ids = request.prompt_ids if isinstance(request, GenerateRequest) else request.ids
        if not ids:
            raise InvalidRequest("the prompt has no tokens; at least 1 is needed")
        vocabulary = self.model.spec.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InvalidRequest(f"token ids must be in 0..{vocabulary - 1}, found {min(ids)}..{max(ids)}")
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {request.request_id!r} is already running")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise InvalidRequest(f"adapter {request.adapter!r} is not loaded; loaded: {sorted(self._adapters)}")
        if isinstance(request, PoolRequest) and request.head is not None and request.head not in self._heads:
            raise InvalidRequest(f"head {request.head!r} is not loaded; loaded: {sorted(self._heads)}")
        num_new = 1 if isinstance(request, GenerateRequest) else 0
        if len(ids) + num_new > self.max_context:
            raise PromptTooLong(len(ids), self.max_context - num_new)
        num_sequences = request.num_choices if isinstance(request, GenerateRequest) else 1
        if len(self._scheduler.waiting) + num_sequences > self.limits.max_waiting:
            raise QueueFull(f"{len(self._scheduler.waiting)} sequences wait; the limit is {self.limits.max_waiting}")

    def _new_sequence(self, request: EngineRequest, choice_index: int) -> EngineSequence:
        self._num_arrived += 1
        ids = list(request.prompt_ids if isinstance(request, GenerateRequest) else request.ids)
        detokenizer = None
        if isinstance(request, GenerateRequest) and self._tokenizer is not None:
            detokenizer = Detokenizer(
                self._tokenizer.token_bytes,
                request.sampling.stop,
                strips_leading_space=self._tokenizer.strips_leading_space,
            )
        adapter = None if request.adapter is None else self._adapters[request.adapter]
        root = root_key(self._model_version, adapter, request.cache_salt) if self._has_prefix_cache else None
        lookup = PromptLookup() if self._has_prompt_lookup and isinstance(request, GenerateRequest) else None
        return EngineSequence(
            request, choice_index, self._num_arrived, ids, len(ids), detokenizer, adapter, root_key=root, lookup=lookup
        )

    def _drop_cancelled(self) -> tuple[list[EngineEvent], list[str]]:
        cancelled = [s for group in self._sequences.values() for s in group if s.is_cancelled]
        events: list[EngineEvent] = []
        for sequence in cancelled:
            events.append(self._finish(sequence, "cancelled", [], "", None))
        return events, sorted({sequence.request_id for sequence in cancelled})

    def _forward(self, chunks: list[Chunk]) -> Tensor:
        """Hidden states of all rows. The plain path computes each sequence by itself, so batch = alone exactly."""
        groups = [[chunk] for chunk in chunks] if self.model.is_exact else [chunks]
        parts = [run_chunks(self.model, self._cache, group) for group in groups]
        for chunk in chunks:
            self._num_prompt_tokens += max(0, min(chunk.end, chunk.sequence.num_prompt) - chunk.start)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _sample(self, chunks: list[Chunk], hidden: Tensor) -> list[EngineEvent]:
        """One token of every sequence that is ready, and one more for every guessed token that was drawn too."""
        ready: list[Chunk] = []
        rows: list[int] = []
        drawing: list[SamplingRow] = []
        for chunk, last_row in zip(chunks, _last_rows(chunks), strict=True):
            if isinstance(chunk.sequence.request, GenerateRequest) and chunk.is_last:
                ready.append(chunk)
                rows += range(last_row - len(chunk.guess), last_row + 1)
                drawing += [_sampling_row(chunk.sequence, chunk.guess[:i]) for i in range(len(chunk.guess) + 1)]
        if not ready:
            return []
        logits = self._logits(hidden.index_select(0, torch.tensor(rows)))
        drawn = sample(logits, drawing)
        logprobs = self._generated_logprobs(logits, drawing, drawn)
        events: list[EngineEvent] = []
        first = 0
        for chunk in ready:
            num_right = _num_equal(chunk.guess, drawn[first:])
            kept = range(first, first + num_right + 1)
            events.append(self._append(chunk, num_right, [drawn[i] for i in kept], [logprobs.get(i) for i in kept]))
            first += len(chunk.guess) + 1
        return events

    def _logits(self, hidden: Tensor) -> Tensor:
        if not self.model.is_exact:
            return self.model.head(hidden)
        return torch.cat([self.model.head(hidden[i : i + 1]) for i in range(hidden.shape[0])])

    def _generated_logprobs(self, logits: Tensor, rows: list[SamplingRow], ids: list[int]) -> dict[int, TokenLogprob]:
        alike: dict[tuple[int, float], list[int]] = {}
        for index, row in enumerate(rows):
            if row.params.num_top_logprobs is not None:
                alike.setdefault((row.params.num_top_logprobs, row.params.logprob_temperature), []).append(index)
        found: dict[int, TokenLogprob] = {}
        for (num_top, temperature), indices in alike.items():
            values = token_logprobs(logits[indices], [ids[i] for i in indices], num_top, temperature)
            found.update(zip(indices, values, strict=True))
        return found

    def _append(
        self, chunk: Chunk, num_right: int, token_ids: list[int], logprobs: list[TokenLogprob | None]
    ) -> EngineEvent:
        """Commit sampled tokens up to the one that ends the answer; the first `num_right` were guessed."""
        sequence = chunk.sequence
        text = ""
        reason: FinishReason | None = None
        num_kept = 0
        while num_kept < len(token_ids) and reason is None:
            sequence.ids.append(token_ids[num_kept])
            text += sequence.detokenizer.feed(token_ids[num_kept]) if sequence.detokenizer else ""
            reason = self._reason_to_end(sequence)
            num_kept += 1
        self._num_generated_tokens += num_kept
        self._learn(chunk, min(num_right, num_kept))
        kept_logprobs = [logprob for logprob in logprobs[:num_kept] if logprob is not None] or None
        if reason is not None:
            return self._finish(sequence, reason, token_ids[:num_kept], text, kept_logprobs)
        return TokenEvent(
            request_id=sequence.request_id,
            choice_index=sequence.choice_index,
            token_ids=token_ids,
            text=text,
            logprobs=kept_logprobs,
            num_reused_tokens=sequence.num_reused or 0,
        )

    def _reason_to_end(self, sequence: EngineSequence) -> FinishReason | None:
        """Whether the token just appended is the last."""
        assert isinstance(sequence.request, GenerateRequest)
        sampling = sequence.request.sampling
        is_stopped = sequence.detokenizer is not None and sequence.detokenizer.is_stopped
        if is_stopped or (sequence.ids[-1] in self._eos_ids and not sampling.ignore_eos):
            return "stop"
        if sequence.num_generated >= sampling.max_tokens or len(sequence.ids) >= self.max_context:
            return "length"
        return None

    def _learn(self, chunk: Chunk, num_right: int) -> None:
        if chunk.sequence.lookup is None or not chunk.guess:
            return
        chunk.sequence.lookup.learn(len(chunk.guess), num_right)
        self._scheduler.accept(chunk.sequence, num_right)
        self._num_guessed_tokens += len(chunk.guess)
        self._num_guessed_right += num_right

    def _finish(
        self,
        sequence: EngineSequence,
        reason: FinishReason,
        token_ids: list[int],
        text: str,
        logprobs: list[TokenLogprob] | None,
    ) -> TokenEvent:
        self._forget(sequence)
        if sequence.detokenizer is not None:
            text += sequence.detokenizer.finish()
        return TokenEvent(
            request_id=sequence.request_id,
            choice_index=sequence.choice_index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            num_reused_tokens=sequence.num_reused or 0,
        )

    def _forget(self, sequence: EngineSequence) -> None:
        self._scheduler.remove(sequence)
        self._num_reused_tokens += sequence.num_reused or 0
        siblings = self._sequences[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request_id]

    def _finish_scores(self, chunks: list[Chunk], hidden: Tensor) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        first_row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            if isinstance(sequence.request, ScoreRequest):
                self._score(sequence, chunk.start, hidden[first_row : first_row + chunk.num_tokens])
                if chunk.is_last:
                    self._forget(sequence)
                    events.append(ScoreEvent(request_id=sequence.request_id, logprobs=sequence.scored))
            first_row += chunk.num_tokens
        return events

    def _score(self, sequence: EngineSequence, start: int, hidden: Tensor) -> None:
        """Row i of `hidden` stands at position start + i and predicts the id after it."""
        assert isinstance(sequence.request, ScoreRequest)
        if len(sequence.scored) > start:  # preempted and computed again: those positions are known
            hidden = hidden[len(sequence.scored) - start :]
            start = len(sequence.scored)
        targets = sequence.ids[start + 1 : start + 1 + hidden.shape[0]]
        for offset in range(0, len(targets), _SCORE_ROWS):
            part = targets[offset : offset + _SCORE_ROWS]
            logits = self._logits(hidden[offset : offset + len(part)])
            sequence.scored += token_logprobs(logits, part, sequence.request.num_top_logprobs)

    def _finish_pools(self, chunks: list[Chunk], hidden: Tensor) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        for chunk, last_row in zip(chunks, _last_rows(chunks), strict=True):
            request = chunk.sequence.request
            if isinstance(request, PoolRequest) and chunk.is_last:
                values = hidden[last_row].to(torch.float32)
                if request.head is not None:
                    values = self._heads[request.head] @ values
                self._forget(chunk.sequence)
                events.append(PoolEvent(request_id=request.request_id, values=values.tolist()))
        return events


def _last_rows(chunks: Iterable[Chunk]) -> list[int]:
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.num_tokens
        rows.append(end - 1)
    return rows


def _sampling_row(sequence: EngineSequence, guess: Sequence[int]) -> SamplingRow:
    """What is drawn after `guess`."""
    assert isinstance(sequence.request, GenerateRequest)
    prompt_ids = sequence.ids[: sequence.num_prompt]
    generated_ids = [*sequence.generated_ids, *guess]
    return SamplingRow(sequence.request.sampling, sequence.choice_index, prompt_ids, generated_ids)


def _num_equal(guess: Sequence[int], drawn: Sequence[int]) -> int:
    """How many leading tokens were guessed right."""
    count = 0
    while count < len(guess) and guess[count] == drawn[count]:
        count += 1
    return count
