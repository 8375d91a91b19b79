"""Blocks held outside any request: those that KV from another worker is written to, and the prefix before them.

A lease pins the cached prefix first and waits for the rest, so leases could come to wait for one another. They cannot,
because all that are still waiting pin no more than `max_pinned_blocks` together, which leaves room for the longest
request beside them. A shorter pinned prefix costs bytes on the wire, nothing else.
"""

from collections import Counter

from engine.api import BlockLease
from engine.block_pool import BlockPool
from pdmesh.hashing import BlockHash


class Reservation:
    """Blocks that a lease waits for.

    Attributes:
        order: Its place among waiting requests: priority 0, then by arrival. The scheduler sets it.
        granted: The lease has them.
    """

    __slots__ = ("granted", "lease", "num_blocks", "order")

    def __init__(self, lease: BlockLease, num_blocks: int) -> None:
        self.lease = lease
        self.num_blocks = num_blocks
        self.order = (0, 0)
        self.granted = False


class LeaseTable:
    """The live leases. A lease that was given back or passed on is empty."""

    def __init__(self, pool: BlockPool, max_pinned_blocks: int) -> None:
        self._pool = pool
        self._max_pinned_blocks = max_pinned_blocks
        self._leases: set[BlockLease] = set()
        # Leases whose prefix counts as pinned, and how many of them pin each block.
        self._pinning: set[BlockLease] = set()
        self._pins: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease: BlockLease) -> bool:
        return lease in self._leases

    def pin_prefix(self, lease: BlockLease, hashes: list[BlockHash]) -> None:
        """Fills a new lease with the longest cached run that begins `hashes`, as far as pinning is allowed."""
        assert lease not in self._leases, "the lease is in use"
        for block_id in self._pool.lookup(hashes):
            if block_id not in self._pins and len(self._pins) >= self._max_pinned_blocks:
                break
            self._pins[block_id] += 1
            lease.block_ids.append(block_id)
        self._pool.acquire(lease.block_ids)
        lease.num_cached_blocks = len(lease.block_ids)
        self._leases.add(lease)
        self._pinning.add(lease)

    def open(self, lease: BlockLease) -> None:
        """Makes an empty lease a live one; does nothing to one that is."""
        if lease not in self._leases:
            assert not lease.block_ids, "the lease was not made here"
            self._leases.add(lease)

    def grant(self, reservation: Reservation) -> None:
        """Adds the blocks, which must be free. From here on the holder needs nothing more, so it pins nothing."""
        self._unpin(reservation.lease)
        reservation.lease.block_ids.extend(self._pool.allocate(reservation.num_blocks))
        reservation.granted = True

    def take_back(self, reservation: Reservation) -> None:
        """Undoes a grant that came too late, if its lease lives still."""
        lease = reservation.lease
        if lease in self._leases and reservation.num_blocks:
            self._pool.free(lease.block_ids[-reservation.num_blocks :])
            del lease.block_ids[-reservation.num_blocks :]

    def release(self, lease: BlockLease) -> None:
        """Frees the blocks; does nothing to a lease that is not live."""
        if lease in self._leases:
            self._pool.free(self.pass_on(lease))

    def pass_on(self, lease: BlockLease) -> list[int]:
        """Ends a live lease; its blocks are the caller's from now on."""
        self._leases.remove(lease)
        self._unpin(lease)
        block_ids = list(lease.block_ids)
        lease.block_ids.clear()
        lease.num_cached_blocks = 0
        return block_ids

    def held_blocks(self) -> list[int]:
        """Every block of every lease, once for each holder; for checks."""
        return [block_id for lease in self._leases for block_id in lease.block_ids]

    def _unpin(self, lease: BlockLease) -> None:
        if lease not in self._pinning:
            return
        self._pinning.remove(lease)
        for block_id in lease.block_ids[: lease.num_cached_blocks]:
            self._pins[block_id] -= 1
            if not self._pins[block_id]:
                del self._pins[block_id]
