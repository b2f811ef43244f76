"""From logits to token ids for a whole batch at once.

Draws depend only on (seed, choice, token index): the same request gives the same text whatever else runs, and a
preempted sequence goes on exactly where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from hashlib import blake2b

import torch

from serving.engine.requests import SamplingParams, TokenLogprob

# Nucleus sampling looks at this many candidates first; only a flatter distribution needs the full sort.
_NUM_CANDIDATES = 256
# Probabilities summed up at once when whole distributions are drawn from: 8 MB in float64.
_SUMMED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs of one sequence."""

    params: SamplingParams
    choice_index: int
    prompt_ids: Rows[int]
    generated_ids: Rows[int]


def uniform_draw(seed: int, choice_index: int, token_index: int) -> float:
    """A number in [0, 1), the same on every machine and in every batch."""
    key = f"{seed}/{choice_index}/{token_index}".encode()
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) / (1 << 53)


def sample(logits: torch.Tensor, rows: Rows[SamplingRow]) -> list[int]:
    """Draw one token id per row. logits: (rows, vocabulary) float32, left as it is."""
    if len(rows) != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sequences")
    penalised = _apply_penalties(logits, rows)
    ids: list[int] = [int(i) for i in penalised.argmax(dim=-1).tolist()]
    whole: list[int] = []
    for index, row in enumerate(rows):
        if row.params.temperature > 0:
            if row.params.top_k is None and row.params.top_p >= 1.0:
                whole.append(index)
            else:
                ids[index] = _draw_from_candidates(penalised[index], row)
    num_together = max(1, _SUMMED_AT_ONCE // logits.shape[1])
    for start in range(0, len(whole), num_together):
        indices = whole[start : start + num_together]
        drawn = _draw_from_all(penalised[indices], [rows[index] for index in indices])
        for index, token_id in zip(indices, drawn, strict=True):
            ids[index] = token_id
    return ids


def _apply_penalties(logits: torch.Tensor, rows: Rows[SamplingRow]) -> torch.Tensor:
    changed = [i for i, row in enumerate(rows) if _has_penalty(row.params)]
    if not changed:
        return logits
    logits = logits.clone()
    for index in changed:
        _penalise(logits[index], rows[index])
    return logits


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def _penalise(logits: torch.Tensor, row: SamplingRow) -> None:
    """In place. Repetition counts prompt and answer (arXiv:1909.05858, section 4.1); the other two the answer only."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.generated_ids}))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    counts = Counter(row.generated_ids)
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(counts))
        times = torch.tensor(list(counts.values()), dtype=logits.dtype)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times


def _draw_from_all(logits: torch.Tensor, rows: Rows[SamplingRow]) -> list[int]:
    """Inverse-CDF draws from whole rows after temperature: what many roll-outs at once need. A row's is its alone."""
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=logits.dtype)
    probabilities = (logits / temperatures.unsqueeze(1)).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.tensor([_uniform(row) for row in rows], dtype=torch.float64)
    targets = uniform.unsqueeze(1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    drawn: list[int] = found.clamp_(max=logits.shape[1] - 1).tolist()
    return drawn


def _draw_from_candidates(logits: torch.Tensor, row: SamplingRow) -> int:
    """Inverse-CDF draw from one row after temperature, top-k and top-p, in this order."""
    probabilities, ids = _candidates(logits / row.params.temperature, row.params)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = torch.tensor(_uniform(row) * float(cumulative[-1]), dtype=torch.float64)
    index = int(torch.searchsorted(cumulative, target, right=True))
    return int(ids[min(index, ids.shape[0] - 1)])


def _uniform(row: SamplingRow) -> float:
    return uniform_draw(row.params.seed, row.choice_index, len(row.generated_ids))


def _candidates(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (not normalised) and ids that survive top-k and top-p, most likely first."""
    vocabulary = scaled.shape[0]
    if params.top_k is not None:
        values, ids = scaled.topk(min(params.top_k, vocabulary))
        probabilities = values.softmax(dim=-1)
    else:
        total = scaled.logsumexp(dim=-1)
        values, ids = scaled.topk(min(_NUM_CANDIDATES, vocabulary))
        probabilities = (values - total).exp()
        if float(probabilities.sum()) < params.top_p:
            values, ids = scaled.sort(descending=True)
            probabilities = (values - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    num_kept = max(1, int((before < params.top_p).sum()))
    return probabilities[:num_kept], ids[:num_kept]


def token_logprobs(
    logits: torch.Tensor, token_ids: Rows[int], num_top: int, temperature: float = 1.0
) -> list[TokenLogprob]:
    """Log-probabilities of chosen tokens under softmax(logits / temperature). logits: (rows, vocabulary) float32."""
    logprobs = (logits if temperature == 1.0 else logits / temperature).log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(list(token_ids)).unsqueeze(1)).squeeze(1).tolist()
    if num_top == 0:
        return [TokenLogprob(i, value, []) for i, value in zip(token_ids, chosen, strict=True)]
    top = logprobs.topk(num_top, dim=-1)
    pairs = [list(zip(i, v, strict=True)) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return [TokenLogprob(i, value, p) for i, value, p in zip(token_ids, chosen, pairs, strict=True)]
