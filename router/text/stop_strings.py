"""Where a text ends: the first stop string in text that arrives in pieces.

However the text is cut into pieces, the same text comes out: a match ends where the first character stands that
completes any stop string; of those completed there, the longest one counts.
"""

from collections.abc import Sequence


class StopStrings:
    """The stop strings of a request; its completions share one. Each string is at least one character long."""

    __slots__ = ("longest", "prefixes", "strings")

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.prefixes = frozenset(text[:length] for text in self.strings for length in range(1, len(text)))
        self.longest = max(map(len, self.strings), default=0)


class StopMatcher:
    """Lets text through up to a stop string, holding back what may yet become one.

    Args:
        stops: What ends the text.
        include: The matched string stays at the end of the text.
    """

    __slots__ = ("_held", "_include", "_stops", "matched")

    def __init__(self, stops: StopStrings, *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The string that ended the text, once one did; nothing is pushed after it."""

    def push(self, text: str) -> str:
        """Takes the next piece; returns the text that is certain by now."""
        # No match begins before what is held: it would have been held itself.
        text = self._held + text
        end, matched = self._first_match(text)
        if matched is not None:
            self.matched = matched
            self._held = ""
            return text[:end] if self._include else text[: end - len(matched)]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What is held, where the text ends without a match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str | None]:
        best_end, best = len(text) + 1, None
        for stop in self._stops.strings:
            start = text.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if end < best_end or (end == best_end and best is not None and len(stop) > len(best)):
                best_end, best = end, stop
        return best_end, best

    def _num_held(self, text: str) -> int:
        prefixes = self._stops.prefixes
        for length in range(min(self._stops.longest - 1, len(text)), 0, -1):
            if text[len(text) - length :] in prefixes:
                return length
        return 0
