"""Answers to learn from, sampled by the serving engine on the policy's present weights.

The ids that the engine drew are the ids that are learned from: nothing is decoded and encoded again on the way. The
engine lives in this process for the length of one roll-out, so that its cache takes no memory while gradients do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from serving.engine.engine import Engine, EngineLimits
from serving.engine.kv_blocks import KVLayout, blocks_for
from serving.engine.prepare import PreparedModel, prepare_live
from serving.engine.requests import GenerateRequest, SamplingParams, TokenEvent
from serving.model.weights import decoder_from_tensors, load_decoder, read_config
from training.batches import Batch
from training.errors import TrainingError
from training.prompts import PromptSet
from training.settings import RolloutSettings
from training.trunk import Trunk, inner_model

ADAPTER = "policy"
# Prompts of one roll-out are prefilled in steps of so many tokens: large products, bounded activations.
_STEP_TOKENS = 2048
_MAX_RUNNING = 256


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Prompts with their sampled answers, one a row, padded on the right.

    ids:             (rows, length) int64; 0 on padding
    is_token:        (rows, length) bool, True on prompt and answer, False on padding
    is_response:     (rows, length) bool, True on sampled tokens, the end of turn included
    engine_logprobs: (rows, length) float32, as the engine saw them at the sampling temperature; 0 off the response
    has_end:         (rows,) bool, True where the model ended its answer, False where it was cut off
    prompt_index:    (rows,) int64, which prompt of the data each row answers
    """

    ids: Tensor
    is_token: Tensor
    is_response: Tensor
    engine_logprobs: Tensor
    has_end: Tensor
    prompt_index: Tensor

    @property
    def num_rows(self) -> int:
        return self.ids.shape[0]

    def lengths(self) -> Tensor:
        """(rows,) int64, tokens of prompt and answer."""
        return self.is_token.sum(1)

    def response_lengths(self) -> Tensor:
        """(rows,) int64, sampled tokens."""
        return self.is_response.sum(1)

    def response_ids(self, row: int) -> list[int]:
        return self.ids[row][self.is_response[row]].tolist()

    def batch(self, rows: Tensor) -> Batch:
        """The given rows for a forward pass, without the columns that none of them needs. rows: (n,) int64."""
        is_token = self.is_token[rows]
        width = int(is_token.sum(1).max())
        is_token = is_token[:, :width]
        positions = torch.arange(width).expand_as(is_token)
        return Batch(
            input_ids=self.ids[rows, :width],
            position_ids=torch.where(is_token, positions, 0),
            sample_ids=is_token.long(),
            is_target=self.is_response[rows, :width],
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint; `Trajectory(**tensors)` makes it again."""
        return {field.name: cast("Tensor", getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer. ids: the end of turn included, if there is one."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    has_end: bool


def make_trajectory(
    prompts: Sequence[Sequence[int]], answers: Sequence[Answer], prompt_index: Sequence[int]
) -> Trajectory:
    """Raises ValueError if there are not as many prompts as answers, or a prompt or answer is empty."""
    width = max(len(prompt) + len(answer.ids) for prompt, answer in zip(prompts, answers, strict=True))
    shape = (len(answers), width)
    ids = torch.zeros(shape, dtype=torch.int64)
    is_token, is_response = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape, dtype=torch.float32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not prompt or not answer.ids:
            raise ValueError(f"row {row} has {len(prompt)} prompt tokens and {len(answer.ids)} sampled ones")
        start, end = len(prompt), len(prompt) + len(answer.ids)
        ids[row, :start] = torch.tensor(prompt)
        ids[row, start:end] = torch.tensor(answer.ids)
        is_token[row, :end] = True
        is_response[row, start:end] = True
        logprobs[row, start:end] = torch.tensor(answer.logprobs)
    has_end = torch.tensor([answer.has_end for answer in answers])
    return Trajectory(ids, is_token, is_response, logprobs, has_end, torch.tensor(prompt_index))


class Sampler:
    """Draws answers from a trunk's present weights.

    With adapters the trunk is prepared once and only the adapter is replaced; full weights are prepared anew each time.
    """

    def __init__(self, trunk: Trunk, settings: RolloutSettings, *, adapter: str | None) -> None:
        """adapter: the policy's in peft's model; None if all weights learn."""
        self._trunk = trunk
        self._settings = settings
        self._adapter = adapter
        self._frozen: PreparedModel | None = None
        self._version = 0

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], prompt_index: Sequence[int]) -> Trajectory:
        """One answer to each prompt; the same weights and seeds draw the same answers.

        Raises TrainingError where a prompt leaves no room for an answer.
        """
        engine = self._engine(prompts)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if len(prompt) >= engine.max_context:
                raise TrainingError(
                    f"a prompt of {len(prompt)} tokens leaves no room for an answer: the model and --kv-megabytes "
                    f"{self._settings.kv_megabytes} hold {engine.max_context}; lower --max-prompt-tokens"
                )
            engine.submit(self._request(str(index), prompt, seed))
        return make_trajectory(prompts, _drain(engine, len(prompts)), prompt_index)

    def _request(self, request_id: str, prompt: Sequence[int], seed: int) -> GenerateRequest:
        sampling = SamplingParams(
            max_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            seed=seed,
            num_top_logprobs=0,
            logprob_temperature=self._settings.temperature,
        )
        adapter = None if self._adapter is None else ADAPTER
        return GenerateRequest(request_id=request_id, prompt_ids=list(prompt), sampling=sampling, adapter=adapter)

    def _engine(self, prompts: Sequence[Sequence[int]]) -> Engine:
        model = self._prepared()
        longest = max(len(prompt) for prompt in prompts) + self._settings.max_new_tokens
        needed = (len(prompts) + 1) * blocks_for(longest + 1) * KVLayout.of(model.spec, model.dtype).block_bytes
        engine = Engine(
            model,
            kv_bytes=min(needed, self._settings.kv_megabytes * 2**20),
            tokenizer=None,
            limits=EngineLimits(
                max_running=min(len(prompts), _MAX_RUNNING),
                max_waiting=len(prompts),
                max_step_tokens=_STEP_TOKENS,
                prefill_slowdown=None,
            ),
            eos_ids=self._trunk.tokenizer.eos_ids,
        )
        if self._adapter is not None:
            self._version += 1
            engine.set_adapter(ADAPTER, lora_tensors(self._trunk.model, self._adapter), self._version)
        return engine

    def _prepared(self) -> PreparedModel:
        precision = self._trunk.compute.precision
        if self._adapter is not None:
            if self._frozen is None:
                self._frozen = prepare_live(load_decoder(self._trunk.source, dtype=precision), precision)
            return self._frozen
        weights = cast("Mapping[str, Tensor]", inner_model(self._trunk.model).state_dict())
        decoder = decoder_from_tensors(read_config(self._trunk.source), weights, torch.float32)
        return prepare_live(decoder, precision)


def sample_iteration(
    sampler: Sampler, prompts: PromptSet, iteration: int, *, num_prompts: int, group: int, seed: int
) -> Trajectory:
    """The answers of one iteration: `group` to each of its next prompts, group after group.

    A function of the weights and the numbers alone, so that a resumed run samples what it would have.
    """
    places = [place for place in prompts.rows_of(iteration, num_prompts, seed) for _ in range(group)]
    seeds = [((seed * 1_000_003) + iteration) * 1_000_003 + row for row in range(len(places))]
    return sampler.sample([prompts.ids[place] for place in places], seeds, places)


def _drain(engine: Engine, num_requests: int) -> list[Answer]:
    """Run the engine to the end. Answers in the order of submission."""
    ids: list[list[int]] = [[] for _ in range(num_requests)]
    logprobs: list[list[float]] = [[] for _ in range(num_requests)]
    has_end = [False] * num_requests
    while engine.has_work:
        for event in engine.step().events:
            assert isinstance(event, TokenEvent)  # only generate requests were submitted
            row = int(event.request_id)
            ids[row] += event.token_ids
            logprobs[row] += [item.logprob for item in event.logprobs or ()]
            if event.finish_reason is not None:
                has_end[row] = event.finish_reason == "stop"
    return [Answer(tuple(i), tuple(p), end) for i, p, end in zip(ids, logprobs, has_end, strict=True)]


def lora_tensors(model: nn.Module, adapter: str) -> Mapping[str, Tensor]:
    """An adapter as the engine takes it: names of the plain modules, the scale multiplied into B."""
    from peft.tuners.lora import LoraLayer

    tensors: dict[str, Tensor] = {}
    for name, module in inner_model(model).named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            a, b = (getattr(module, f"lora_{end}")[adapter].weight.detach() for end in ("A", "B"))
            tensors[f"{name}.lora_A.weight"] = a
            tensors[f"{name}.lora_B.weight"] = b * module.scaling[adapter]
    return tensors
