"""A preference with a known rule: an answer that names a number beats one that does not.

People's preferences are noise at the size of a test; with a rule, a reward model's accuracy and a policy's progress can
be checked on rows that nobody has seen. Questions, nouns and wordings of the held-out rows occur in no training row;
the numbers themselves occur in both.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, TypeAlias

from serving.model.chat_format import ChatMessage
from training.data.licences import LICENCES_NAME
from training.data.records import Conversation, Prompt, Ranking, Row, encode_row

__all__ = [
    "SOURCE",
    "Split",
    "generate_conversations",
    "generate_prompts",
    "generate_rankings",
    "names_a_number",
    "write_generated",
]

Split: TypeAlias = Literal["train", "held_out"]
SOURCE = "generated_numbers"
MAX_ANSWERS = 6

_NUMBER_WORDS = "two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty fifty"
_LARGE_NUMBERS = ("hundred", "thousand", "million")
# "one" and "second" are left out: in English text they mostly are no numbers.
_NUMBER = re.compile(rf"\d|\b(?:{'|'.join((*_NUMBER_WORDS.split(), *_LARGE_NUMBERS))})\b", re.IGNORECASE)

_QUANTITIES = (
    *_NUMBER_WORDS.split(),
    *(f"a {word}" for word in _LARGE_NUMBERS),
    "3",
    "7",
    "12",
    "15",
    "40",
    "99",
    "250",
)
_VAGUE = ("some", "many", "a few", "several", "no", "the", "plenty of", "lots of", "hardly any", "these", "all those")


@dataclass(frozen=True, slots=True)
class _Wordings:
    """counted: answers with a place for how many there are. plain: answers without one. nouns: plural, by spaces."""

    questions: tuple[str, ...]
    counted: tuple[str, ...]
    plain: tuple[str, ...]
    nouns: str


_WORDINGS: dict[Split, _Wordings] = {
    "train": _Wordings(
        questions=(
            "Tell me about the {noun}.",
            "What do you know about {noun}?",
            "Did you see any {noun} today?",
            "What happened with the {noun}?",
            "Write a sentence about {noun}.",
            "Are there {noun} near the house?",
            "What did she do with the {noun}?",
            "Who has {noun}?",
            "Say something about {noun}.",
            "Where are the {noun}?",
            "What did you find in the room with the {noun}?",
            "Can you tell me a story about {noun}?",
            "How was the day with the {noun}?",
            "Which of you brought {noun}?",
            "Why are there {noun} here?",
            "When did you last see {noun}?",
            "Is it true what they say of the {noun}?",
            "Could we have {noun} in the kitchen?",
        ),
        counted=(
            "There are {quantity} {noun} in the garden.",
            "I saw {quantity} {noun} this morning.",
            "She has {quantity} {noun} at home.",
            "My brother found {quantity} {noun} by the river.",
            "We left {quantity} {noun} on the road.",
            "He gave me {quantity} {noun} for my birthday.",
            "You will find {quantity} {noun} in the old house.",
            "They bought {quantity} {noun} and went home.",
            "{quantity} {noun} were lost in the snow.",
            "{quantity} {noun} stood in a row.",
            "In the morning {quantity} {noun} were gone.",
            "Near the bridge you can see {quantity} {noun}.",
            "Her uncle sold {quantity} {noun} at the market.",
            "The children drew {quantity} {noun}.",
            "With {quantity} {noun} we would be happy.",
            "Behind the church there were {quantity} {noun}.",
            "The teacher showed us {quantity} {noun} and then we left.",
            "It takes {quantity} {noun} to fill the room.",
            "A man with {quantity} {noun} came by train.",
            "On Sunday she counted {quantity} {noun}.",
            "Yesterday {quantity} {noun} were in the street.",
            "I would give {quantity} {noun} for a good night.",
            "Nothing is left of {quantity} {noun}.",
            "Our neighbour asked for {quantity} {noun} last year.",
        ),
        plain=(
            "I like {noun} very much.",
            "I do not know anything about {noun}.",
            "My mother never liked {noun}.",
            "They are over there, by the window.",
            "We should talk about {noun} another day.",
            "What a strange question.",
            "It was so cold that they all stayed inside.",
            "Ask your father about the {noun}.",
            "The {noun} were very old and nobody wanted them.",
        ),
        nouns="cats dogs horses birds flowers trees books letters chairs tables apples houses ships boats stones hats "
        "coats doors windows candles coins keys rings roses sheep cows goats foxes spoons shoes rivers bridges ducks "
        "plates songs stars farms walls bags beds fish plants boxes bees wolves kings wheels nuts eggs ropes",
    ),
    "held_out": _Wordings(
        questions=(
            "Please describe the {noun}.",
            "Have you heard about the {noun}?",
            "What can you say about {noun}?",
            "Do you like {noun}?",
            "Why did he speak of {noun}?",
            "What is it about the {noun}?",
            "Will there be {noun} tomorrow?",
            "How do you find the {noun}?",
        ),
        counted=(
            "The farmer keeps {quantity} {noun} behind the wall.",
            "Last week {quantity} {noun} came to the door.",
            "I remember {quantity} {noun} from my village.",
            "The king sent {quantity} {noun} to the town.",
        ),
        plain=(
            "Nobody ever asked me about {noun}.",
            "I have always loved {noun}.",
            "It is a long story, my friend.",
        ),
        nouns="pictures bottles knives bells lamps maps pens cups towns roads hens pigs clocks baskets",
    ),
}


def names_a_number(text: str) -> bool:
    """The rule: whether the text has a digit or a number word from two on."""
    return _NUMBER.search(text) is not None


def generate_prompts(split: Split) -> list[Prompt]:
    """Every question about every noun, in an order that does not sort them."""
    wordings = _WORDINGS[split]
    prompts = [
        Prompt(_ask(question, noun), SOURCE, "en")
        for question, noun in product(wordings.questions, wordings.nouns.split())
    ]
    random.Random(0).shuffle(prompts)  # noqa: S311 - orders rows, guards no secret
    return prompts


def generate_rankings(split: Split, count: int, seed: int = 0) -> list[Ranking]:
    """Of 2 to MAX_ANSWERS different answers each: those that name a number share rank 1, the others rank 2."""
    rng = random.Random(seed)  # noqa: S311
    wordings = _WORDINGS[split]
    rankings: list[Ranking] = []
    for index in range(count):
        noun = rng.choice(wordings.nouns.split())
        # Half are pairs, so that both schemas are met.
        num_answers = 2 if index % 2 == 0 else rng.randint(3, MAX_ANSWERS)
        num_best = rng.randint(1, num_answers - 1)
        best = _draw_answers(rng, wordings, noun, num_best, with_number=True)
        rest = _draw_answers(rng, wordings, noun, num_answers - num_best, with_number=False)
        ranks = (1,) * len(best) + (2,) * len(rest)
        rankings.append(Ranking(_ask(rng.choice(wordings.questions), noun), (*best, *rest), ranks, SOURCE))
    return rankings


def generate_conversations(split: Split, count: int, seed: int = 0) -> list[Conversation]:
    """What a policy starts from: answers of which a quarter, as drawn, name a number. The rest is PPO's to gain."""
    rng = random.Random(seed)  # noqa: S311
    wordings = _WORDINGS[split]
    conversations: list[Conversation] = []
    for _ in range(count):
        noun = rng.choice(wordings.nouns.split())
        (answer,) = _draw_answers(rng, wordings, noun, 1, with_number=rng.random() < 0.25)
        messages = (*_ask(rng.choice(wordings.questions), noun), ChatMessage("assistant", answer))
        conversations.append(Conversation(messages, SOURCE, "en"))
    return conversations


def write_generated(directory: Path, *, num_rankings: int = 1200, num_conversations: int = 1200, seed: int = 0) -> None:
    """{rankings, prompts, conversations}{, _held_out}.jsonl and the licences.json that lets their weights ship.

    Held-out rankings and conversations are a quarter as many. Conversations may repeat; loading leaves those out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    splits: tuple[tuple[Split, str, int], ...] = (("train", "", 1), ("held_out", "_held_out", 4))
    for split, suffix, divisor in splits:
        _write_rows(directory / f"rankings{suffix}.jsonl", generate_rankings(split, num_rankings // divisor, seed))
        _write_rows(directory / f"prompts{suffix}.jsonl", generate_prompts(split))
        conversations = generate_conversations(split, num_conversations // divisor, seed)
        _write_rows(directory / f"conversations{suffix}.jsonl", conversations)
    licences = {"about": "Sentences made by this program from its own words.", "yes": [SOURCE]}
    (directory / LICENCES_NAME).write_text(json.dumps(licences, indent=1) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_bytes(b"".join(encode_row(row) + b"\n" for row in rows))


def _ask(question: str, noun: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", question.format(noun=noun)),)


def _draw_answers(rng: random.Random, wordings: _Wordings, noun: str, count: int, *, with_number: bool) -> list[str]:
    answers: list[str] = []
    while len(answers) < count:
        answer = _draw_answer(rng, wordings, noun, with_number=with_number)
        if answer not in answers:
            answers.append(answer)
    return answers


def _draw_answer(rng: random.Random, wordings: _Wordings, noun: str, *, with_number: bool) -> str:
    # Most answers without a number differ from one with a number in nothing else, so that no other cue is learnt.
    if not with_number and rng.random() < 0.25:
        return rng.choice(wordings.plain).format(noun=noun)
    quantity = rng.choice(_QUANTITIES if with_number else _VAGUE)
    answer = rng.choice(wordings.counted).format(quantity=quantity, noun=noun)
    return answer[0].upper() + answer[1:]
