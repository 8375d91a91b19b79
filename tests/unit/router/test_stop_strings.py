"""Stop strings: the same text whatever pieces it comes in."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.stop_strings import StopMatcher, StopStrings

# Few letters, so that stop strings occur, overlap and nearly occur.
texts = st.text("abc", max_size=40)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def run(pieces: list[str], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(StopStrings(stops), include=include)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.matched is not None:
            return out, matcher.matched
    return out + matcher.flush(), None


def reference(text: str, stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """Character by character: the first one after which the text ends with a stop string, the longest such."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            matched = max(found, key=len)
            return text[: end if include else end - len(matched)], matched
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(texts, stop_lists, st.lists(st.integers(0, 40), max_size=12), st.booleans())
def test_any_pieces_give_the_same_text(text: str, stops: list[str], places: list[int], include: bool) -> None:
    assert run(cut(text, places), stops, include=include) == reference(text, stops, include=include)


@given(texts, stop_lists)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    out = ""
    for count, character in enumerate(text, 1):
        out += matcher.push(character)
        if matcher.matched is not None:
            return
        held = text[len(out) : count]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["hello"], ["x"], ("hello", None)),
        (["ab", "cd"], ["bc"], ("a", "bc")),
        (["aab"], ["ab"], ("a", "ab")),
        (["a", "a", "b"], ["aab", "b"], ("", "aab")),
        (["x", "ab"], ["abc"], ("xab", None)),
        (["one\n", "\nHuman:"], ["\n\nHuman:", "STOP"], ("one", "\n\nHuman:")),
        (["naïve ", "né", "e"], ["née"], ("naïve ", "née")),
    ],
)
def test_matches(pieces: list[str], stops: list[str], expected: tuple[str, str | None]) -> None:
    assert run(pieces, stops) == expected
