"""Data of the three demo tasks: generated from word lists with a fixed seed, so nothing has to be downloaded.

Every task reads one user message and answers in a fixed form that either is right or is not (exact match). Evaluation
uses words, sentences and dates that training never sees, so a good score means the task was learned, not the list.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from peftserve.demo import vocabulary as vocab

Split = Literal["train", "held_out"]
AdapterKind = Literal["lora", "prefix", "bottleneck"]


@dataclass(frozen=True)
class Example:
    """One user message and the only answer that counts as right."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A demo task.

    Attributes:
        name: adapter id and folder name.
        kind: the adapter kind that is trained for it.
        summary: what the adapter does, for people.
        instruction: the task in words; put before the message, it gives the bare base a fair chance.
        draw: draws one example of a split.
    """

    name: str
    kind: AdapterKind
    summary: str
    instruction: str
    draw: Callable[[random.Random, Split], Example]


def _pick(rng: random.Random, words: vocab.WordList, split: Split) -> str:
    return rng.choice(words.train if split == "train" else words.held_out)


def _invent(rng: random.Random) -> str:
    """A capitalized word of two or three syllables that no list holds, such as "Chevoust"."""
    syllables = (rng.choice(vocab.ONSETS) + rng.choice(vocab.VOWELS) for _ in range(rng.randint(2, 3)))
    return ("".join(syllables) + rng.choice(("", *vocab.CODAS))).capitalize()


def _pick_proper_noun(rng: random.Random, words: vocab.WordList, split: Split) -> str:
    return _invent(rng) if split == "train" and rng.random() < 0.5 else _pick(rng, words, split)


def _draw_order(rng: random.Random, split: Split) -> Example:
    spoken, quantity = rng.choice(vocab.QUANTITIES)
    if rng.random() < 0.5:
        quantity = rng.randint(2, 99)
        spoken = str(quantity)
    fields = {
        "name": _pick_proper_noun(rng, vocab.NAMES, split),
        "item": f"{_pick(rng, vocab.COLORS, split)} {_pick(rng, vocab.GOODS, split)}",
        "quantity": quantity,
        "city": _pick_proper_noun(rng, vocab.CITIES, split),
    }
    text = _pick(rng, vocab.ORDER_TEMPLATES, split).format(**{**fields, "quantity": spoken})
    # YAML, not JSON: its values follow a space, as words in the prompt do, so both are the same tokens. After JSON's
    # quotation mark a word is other tokens, and a model this small misspells the names that it has not been trained on.
    answer = "\n".join(f"{key}: {value}" for key, value in fields.items())
    return Example(text[0].upper() + text[1:], answer)


def _draw_ticket(rng: random.Random, split: Split) -> Example:
    label = rng.choice(sorted(vocab.TICKETS))
    opener = _pick(rng, vocab.TICKET_OPENERS, split)
    closer = _pick(rng, vocab.TICKET_CLOSERS, split)
    text = _pick(rng, vocab.TICKETS[label], split)
    if closer and text[-1] != "?":
        text += "."
    return Example(f"{opener}{text}{closer}", f"route: {label}")


_FIRST_DAY = date(1900, 1, 1)
_DAYS = (date(2050, 1, 1) - _FIRST_DAY).days


def date_split(day: date) -> Split | None:
    """Split a date belongs to; ``None`` for dates that neither split uses.

    A held-out date has a year and a (month, day) pair that no training date has.
    """
    rare_year = day.year % 7 == 3
    rare_day = (day.month * 31 + day.day) % 5 == 0
    if rare_year and rare_day:
        return "held_out"
    return None if rare_year or rare_day else "train"


def year_in_words(year: int) -> str:
    """A year from 1900 to 2099 as it is spoken: 1998 → "nineteen ninety-eight", 2007 → "two thousand and seven"."""
    century, rest = divmod(year, 100)
    if year < 1900 or year > 2099:
        raise ValueError(f"year {year} is outside 1900..2099")
    tens, ones = divmod(rest, 10)
    above_nineteen = vocab.TENS[tens] + (f"-{vocab.ONES[ones]}" if ones else "")
    low = vocab.ONES[rest] if rest < 20 else above_nineteen
    if century == 20 and rest < 10:
        return "two thousand" + (f" and {low}" if rest else "")
    if rest == 0:
        return "nineteen hundred"
    high = "nineteen" if century == 19 else "twenty"
    return f"{high} oh {low}" if rest < 10 else f"{high} {low}"


def _draw_date(rng: random.Random, split: Split) -> Example:
    day = _FIRST_DAY
    while date_split(day) != split:
        day = _FIRST_DAY + timedelta(days=rng.randrange(_DAYS))
    suffix = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    spoken = rng.choice(vocab.DATE_FORMS).format(
        day=day.day,
        short=f"{day.day}{suffix}",
        ordinal=vocab.ORDINALS[day.day],
        month=vocab.MONTHS[day.month - 1],
        year=day.year,
        year_words=year_in_words(day.year),
    )
    text = _pick(rng, vocab.DATE_CONTEXTS, split).format(date=spoken)
    return Example(text[0].upper() + text[1:], day.isoformat())


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "order-yaml",
            "lora",
            "turns an order in plain words into YAML",
            "Extract the order as YAML with the keys name, item, quantity and city, one a line, in this order. "
            "Answer with the YAML only.",
            _draw_order,
        ),
        Task(
            "ticket-router",
            "prefix",
            "sends a customer's message to the right team",
            "Which team must answer this message? Answer only with one of these lines: "
            + ", ".join(f'"route: {label}"' for label in sorted(vocab.TICKETS))
            + ".",
            _draw_ticket,
        ),
        Task(
            "iso-date",
            "bottleneck",
            "finds the date in a sentence and writes it as YYYY-MM-DD",
            "Write the date in this sentence as YYYY-MM-DD. Answer with the date only.",
            _draw_date,
        ),
    )
}


def examples(name: str, split: Split, count: int, seed: int = 0) -> list[Example]:
    """``count`` examples of task ``name``; the same arguments always give the same list.

    Training examples may repeat. Held-out examples are all different.

    Raises:
        KeyError: unknown task name.
        ValueError: ``count`` is negative, or the task has fewer different held-out examples than ``count``.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = random.Random(f"{name}/{split}/{seed}")
    draw = TASKS[name].draw
    if split == "train":
        return [draw(rng, split) for _ in range(count)]
    found: dict[Example, None] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        found[draw(rng, split)] = None
    if len(found) < count:
        raise ValueError(f"task {name!r} has fewer than {count} different held-out examples")
    return list(found)


def exact_match(output: str, answer: str) -> bool:
    """Whether ``output`` is the answer, whitespace around it aside."""
    return output.strip() == answer
