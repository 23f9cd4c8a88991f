"""Text from elsewhere, made fit to be shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deephyper_balsam.common.wording import by_kind, counted, pictured, printable, without_numbers

ANYTHING = st.text(st.characters(exclude_categories=[]))


@given(ANYTHING)
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    for shown in (printable(text), pictured(text)):
        assert all(one.isprintable() or one in "\n\t\u200c\u200d" for one in shown)
        shown.encode()
    assert len(pictured(text)) == len(text)


@given(st.text(st.characters(categories=["L", "N", "P"])))
def test_words_of_any_language_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


def test_what_is_not_printed_stands_as_python_writes_it() -> None:
    assert printable("\x1b[31mred\x07\r\x9b\u202e\udcff") == r"\x1b[31mred\x07\r\x9b\u202e\udcff"
    assert printable("two\nlines\tand columns") == "two\nlines\tand columns"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ValueError: loss is 3.25 at step 17", "ValueError: loss is -1e-07 at step 200"),
        ("object at 0x7f3a", "object at 0xdead01"),
        ("timed out after 30 s", "timed out after 1,800.5 s"),
        ("loss is nan", "loss is -inf"),
        ("loss is 3.25", "loss is NaN"),
        ("node nid00012 died", "node nid04711 died"),
    ],
)
def test_messages_that_differ_only_in_numbers_are_alike(one: str, other: str) -> None:
    assert without_numbers(one) == without_numbers(other)
    (example, times), *more = by_kind([(one, 1), (other, 3)])
    assert (example, times, more) == (f"{other} (also with other numbers)", 4, [])


def test_other_messages_stay_apart_and_the_most_frequent_is_first() -> None:
    assert by_kind([("a", 1), ("b 1", 2), ("c", 5)]) == [("c", 5), ("b 1", 2), ("a", 1)]


def test_one_is_no_several() -> None:
    assert [counted(n, "point") for n in (0, 1, 2)] == ["0 points", "1 point", "2 points"]
    assert counted(1, "run was", "runs were") == "1 run was"
