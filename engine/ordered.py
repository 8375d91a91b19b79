"""A list that keeps its entries in their order: who runs first, who waits first, who is preempted last."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter
from typing import Generic, Protocol, TypeVar


class HasOrder(Protocol):
    """`order` is (-priority, arrival): distinct for any two entries, and fixed while the entry is listed."""

    @property
    def order(self) -> tuple[int, int]: ...


T = TypeVar("T", bound=HasOrder)

_order = attrgetter("order")


class Ordered(Generic[T]):
    """Entries by `order`, least first. Additions and removals search by bisection and shift pointers."""

    def __init__(self) -> None:
        self._entries: list[T] = []
        self._snapshot: tuple[T, ...] | None = ()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def __reversed__(self) -> Iterator[T]:
        return reversed(self._entries)

    def __getitem__(self, index: int) -> T:
        return self._entries[index]

    def __contains__(self, entry: T) -> bool:
        index = bisect_left(self._entries, entry.order, key=_order)
        return index < len(self._entries) and self._entries[index] is entry

    def snapshot(self) -> tuple[T, ...]:
        """The entries; the same object until one is added or removed."""
        if self._snapshot is None:
            self._snapshot = tuple(self._entries)
        return self._snapshot

    def add(self, entry: T) -> None:
        self._snapshot = None
        insort(self._entries, entry, key=_order)

    def remove(self, entry: T) -> None:
        """Raises ValueError if it is not there."""
        index = bisect_left(self._entries, entry.order, key=_order)
        if index == len(self._entries) or self._entries[index] is not entry:
            raise ValueError(f"{entry!r} is not listed")
        self._snapshot = None
        del self._entries[index]
