"""The demo tasks' data: deterministic, split without leaks, and answers that follow from the prompts."""

from __future__ import annotations

from collections import Counter
from datetime import date, timedelta

import pytest
import yaml

from peftserve.demo import vocabulary as vocab
from peftserve.demo.tasks import TASKS, date_split, exact_match, examples, year_in_words

WORD_LISTS = {name: value for name, value in vars(vocab).items() if isinstance(value, vocab.WordList)} | {
    f"TICKETS[{label}]": words for label, words in vocab.TICKETS.items()
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_same_arguments_give_the_same_examples(name: str, split: str) -> None:
    assert examples(name, split, 50, seed=3) == examples(name, split, 50, seed=3)
    assert examples(name, split, 50, seed=3) != examples(name, split, 50, seed=4)


@pytest.mark.parametrize("name", TASKS)
def test_held_out_prompts_are_distinct_and_never_trained_on(name: str) -> None:
    held_out = [example.prompt for example in examples(name, "held_out", 200)]
    assert len(set(held_out)) == 200
    assert not set(held_out) & {example.prompt for example in examples(name, "train", 5000)}


@pytest.mark.parametrize("name", WORD_LISTS)
def test_word_lists_have_two_disjoint_parts(name: str) -> None:
    words = WORD_LISTS[name]
    shared = set(words.train) & set(words.held_out)
    allowed = {""} if name in ("TICKET_OPENERS", "TICKET_CLOSERS") else set()
    assert shared == allowed


def test_order_answers_are_yaml_with_the_words_of_the_prompt() -> None:
    for example in examples("order-yaml", "train", 300):
        order = yaml.safe_load(example.answer)
        assert list(order) == ["name", "item", "quantity", "city"]
        assert all(order[field] in example.prompt for field in ("name", "item", "city"))
        spoken = {str(order["quantity"])} | {word for word, number in vocab.QUANTITIES if number == order["quantity"]}
        assert any(form in example.prompt.lower() for form in spoken)


def test_held_out_orders_use_only_held_out_words() -> None:
    for example in examples("order-yaml", "held_out", 200):
        order = yaml.safe_load(example.answer)
        color, goods = order["item"].split(" ", 1)
        assert order["name"] in vocab.NAMES.held_out
        assert order["city"] in vocab.CITIES.held_out
        assert (color in vocab.COLORS.held_out, goods in vocab.GOODS.held_out) == (True, True)


def test_ticket_labels_are_balanced() -> None:
    counts = Counter(example.answer for example in examples("ticket-router", "train", 1200))
    assert set(counts) == {f"route: {label}" for label in vocab.TICKETS}
    assert min(counts.values()) > 150


def test_held_out_dates_share_neither_year_nor_day_with_training() -> None:
    days = [date(1900, 1, 1) + timedelta(days=offset) for offset in range(150 * 365)]
    train = [day for day in days if date_split(day) == "train"]
    held_out = [day for day in days if date_split(day) == "held_out"]
    assert not {day.year for day in train} & {day.year for day in held_out}
    assert not {(day.month, day.day) for day in train} & {(day.month, day.day) for day in held_out}
    assert len(held_out) > 1000


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_date_answers_are_valid_days_of_their_split(split: str) -> None:
    for example in examples("iso-date", split, 300):
        day = date.fromisoformat(example.answer)
        assert date_split(day) == split
        assert vocab.MONTHS[day.month - 1] in example.prompt
        spoken = example.prompt.lower()
        assert str(day.year) in spoken or year_in_words(day.year) in spoken
        assert str(day.day) in spoken or vocab.ORDINALS[day.day] in spoken


@pytest.mark.parametrize(
    ("year", "words"),
    [
        (1900, "nineteen hundred"),
        (1905, "nineteen oh five"),
        (1912, "nineteen twelve"),
        (1980, "nineteen eighty"),
        (1998, "nineteen ninety-eight"),
        (2000, "two thousand"),
        (2007, "two thousand and seven"),
        (2024, "twenty twenty-four"),
    ],
)
def test_year_in_words(year: int, words: str) -> None:
    assert year_in_words(year) == words


def test_years_in_words_are_unambiguous() -> None:
    assert len({year_in_words(year) for year in range(1900, 2100)}) == 200


@pytest.mark.parametrize("year", [1899, 2100])
def test_years_outside_the_range_are_refused(year: int) -> None:
    with pytest.raises(ValueError, match=str(year)):
        year_in_words(year)


def test_exact_match_ignores_only_outer_whitespace() -> None:
    assert exact_match(" 1998-05-03\n", "1998-05-03")
    assert not exact_match("1998-05-03.", "1998-05-03")
    assert not exact_match("1998-05- 03", "1998-05-03")


def test_bad_requests_are_refused() -> None:
    with pytest.raises(KeyError):
        examples("no-such-task", "train", 1)
    with pytest.raises(ValueError, match="negative"):
        examples("iso-date", "train", -1)
    with pytest.raises(ValueError, match="fewer than 5000"):
        examples("ticket-router", "held_out", 5000)
