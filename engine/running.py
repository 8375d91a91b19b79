"""The requests that have a seat in the batch, in their order: those that decode, and those that compute prompts."""

from engine.ordered import Ordered
from engine.request import Request


class RunningRequests:
    """Owns the seats. A request decodes from when it lacks no more than its last token until it leaves.

    Attributes:
        decoding: Compute one token in every step.
        prefilling: Compute chunks, as far as a step has room for them.
    """

    def __init__(self, num_seats: int) -> None:
        self.decoding: Ordered[Request] = Ordered()
        self.prefilling: Ordered[Request] = Ordered()
        self._num_seats = num_seats
        self._seats = list(reversed(range(num_seats)))
        self._newly_seated: list[Request] = []

    def __len__(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def full(self) -> bool:
        return not self._seats

    def seat(self, request: Request, *, decoding: bool) -> None:
        """Gives a free seat to `request`."""
        request.seat = self._seats.pop()
        request.decoding = decoding
        (self.decoding if decoding else self.prefilling).add(request)
        self._newly_seated.append(request)

    def begin_decoding(self, request: Request) -> None:
        """`request` has computed its prompt."""
        self.prefilling.remove(request)
        self.decoding.add(request)
        request.decoding = True

    def remove(self, request: Request) -> None:
        """Takes its seat from `request`."""
        (self.decoding if request.decoding else self.prefilling).remove(request)
        self._seats.append(request.seat)
        request.seat = -1
        request.decoding = False

    def take_newly_seated(self) -> list[Request]:
        """Who got a seat since the last call, and has it still."""
        seated = [request for request in self._newly_seated if request.seat >= 0]
        self._newly_seated.clear()
        return seated

    def last_preemptible(self) -> Request:
        """The last in order of those whose blocks may be taken; there must be one."""
        candidates = [next(reversed(self.decoding), None)]
        candidates.append(next((request for request in reversed(self.prefilling) if not request.hold_blocks), None))
        return max((request for request in candidates if request is not None), key=lambda request: request.order)

    def check_invariants(self, block_size: int) -> None:
        """Raises AssertionError where seats and requests contradict each other. For tests."""
        requests = [*self.decoding, *self.prefilling]
        assert len({request.seat for request in requests} | set(self._seats)) == self._num_seats
        assert len(self._seats) + len(requests) == self._num_seats
        for request in requests:
            num_missing = request.num_tokens - request.num_computed_tokens
            assert request.decoding == (request in self.decoding)
            assert num_missing == 1 if request.decoding else num_missing >= 1, f"{request} lacks {num_missing} tokens"
            assert request.num_computed_tokens <= len(request.block_table) * block_size
