"""As much of NIXL, NVIDIA's library for remote memory, as transport `nixl` needs; nothing else calls the library.

    lent = LentMemory(memory, num_bytes)            lets whoever knows lent.description read this memory
    reader = RemoteReader(…)                        reads it
    peer = reader.connect(description)
    with reader.read(peer, places, num_bytes, is_wanted) as staged: …
    reader.disconnect(peer)

A read that was given up may still be under way: releasing its handle only asks the network to stop it, and an error of
one of its pieces says nothing of the others. So no read ever goes where its bytes are wanted. It goes into staging
memory, which is used again only after a read that has come to its good end; the rest stays set aside for as long as the
library might write to it. That costs one copy within the processor's cache, and a peer that hangs costs staging
memory, not KV blocks. It also means that the cache itself is not known to the library, let alone to the network.
"""

import logging
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from kvstore.transfer import connection
from pdmesh.errors import CorruptionError, MeshError, UnavailableError

log = logging.getLogger(__name__)

# Staging memories set aside at once, after which this process reads no more; each is of a peer that failed in mid-read.
MAX_SET_ASIDE = 64
# How long a waiting reader sleeps at most between two looks.
MAX_PAUSE_S = 0.0002
PAUSE_STEP_S = 0.00001
# An agent's thread looks after the network at least so often, also where nothing wakes it.
PROGRESS_DELAY_US = 10_000
# Where the memory begins, and its size; the library's metadata follows.
_REGION = struct.Struct("<QQ")
MAX_DESCRIPTION_BYTES = 64 * 1024

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class LentMemory:
    """Memory of this process that others may read, for as long as this object lives.

    Whoever holds its description can read all of it: give it to peers that are trusted with the KV of every tenant.

    Args:
        memory: Its first bytes; kept from being freed.
        num_bytes: All of it.

    Raises UnavailableError where the library refuses.
    """

    def __init__(self, memory: memoryview, num_bytes: int) -> None:
        self._memory = np.frombuffer(memory, np.uint8)
        address = self._memory.ctypes.data
        with _as_unavailable("cannot lend memory", reason="NIXL_UNUSABLE"):
            self._agent = _Agent()
            self._agent.register(address, num_bytes)
            # After registering: the keys to the memory are part of it.
            self.description = _REGION.pack(address, num_bytes) + self._agent.metadata()


@dataclass(slots=True, eq=False)
class Peer:
    """One lent memory of another process, as a reader knows it.

    Attributes:
        num_bytes: Of its memory.
        num_users: Connections and reads that have not let go of it.
    """

    description: bytes
    name: bytes
    address: int
    num_bytes: int
    num_users: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A read that was given up."""

    peer: Peer
    handle: int
    staging: Bytes


class RemoteReader:
    """Reads from memory that others lend; on blocking threads, any number of them at once.

    Args:
        staging_bytes: The most that one read may ask for; called when the first one comes.

    Raises UnavailableError where the library cannot be used.
    """

    def __init__(self, staging_bytes: Callable[[], int]) -> None:
        with _as_unavailable("NIXL cannot be used", reason="NIXL_UNUSABLE"):
            self._agent = _Agent()
        self._staging_bytes = staging_bytes
        self._lock = threading.Lock()
        self._peers: dict[bytes, Peer] = {}
        self._free: list[Bytes] = []
        self._given_up: list[_Read] = []
        # Of reads that failed: never used again, and not freed before the agent.
        self._lost: list[Bytes] = []

    @property
    def num_set_aside(self) -> int:
        """Staging memories that are not used again, for now or for ever, because a read of theirs did not end well."""
        with self._lock:
            self._look_after_given_up()
            return len(self._given_up) + len(self._lost)

    def connect(self, description: bytes) -> Peer:
        """Prepares for reads from a memory that somebody lends; pair with `disconnect`.

        Parses, in the library, what the peer says: do it for peers that have proven who they are. Raises
        CorruptionError for what is no description, UnavailableError where the library cannot reach its memory.
        """
        if len(description) <= _REGION.size:
            raise CorruptionError("no description of a memory", reason="KV_PROTOCOL", stage="transfer")
        with self._lock:
            peer = self._peers.get(description)
            if peer is None:
                with _as_unavailable("cannot reach the sender's memory", reason="NIXL_UNREACHABLE"):
                    name = self._agent.add_peer(description[_REGION.size :])
                peer = self._peers[description] = Peer(description, name, *_REGION.unpack_from(description))
            peer.num_users += 1
            return peer

    def disconnect(self, peer: Peer) -> None:
        """Lets go of a peer."""
        with self._lock:
            self._let_go(peer)

    @contextmanager
    def read(
        self, peer: Peer, places: Sequence[int], num_bytes: int, is_wanted: Callable[[], bool]
    ) -> Iterator[memoryview]:
        """Reads `num_bytes` at each of `places`, in bytes from the beginning of the peer's memory, laid end to end.

        What it yields is valid inside the `with`. `is_wanted` is asked while the read is under way; once it says no,
        the read is given up. Raises UnavailableError then, and where the peer does not answer or the read fails.
        """
        total = len(places) * num_bytes
        staging = self._take_staging()
        assert total <= len(staging), "the caller keeps to staging_bytes"
        try:
            with _as_unavailable("cannot read the sender's memory", reason="SENDER_LOST"):
                remote = [peer.address + place for place in places]
                handle = self._agent.prepare_read(staging.ctypes.data, peer.name, remote, num_bytes)
        except BaseException:
            # Nothing was begun.
            self._give_back(staging)
            raise
        try:
            with _as_unavailable("cannot read the sender's memory", reason="SENDER_LOST"):
                self._finish(handle, is_wanted)
        except BaseException:
            with self._lock:
                peer.num_users += 1
                self._given_up.append(_Read(peer, handle, staging))
            raise
        self._agent.release(handle)
        try:
            yield staging.data[:total]
        finally:
            self._give_back(staging)

    def close(self) -> None:
        """Ends what may still be under way; no other method may run, now or later."""
        set_aside = [self._lost, [read.staging for read in self._given_up]]
        self._given_up = []
        # The agent takes its network connections with it: only then is nothing written any more.
        del self._agent
        del set_aside

    def _finish(self, handle: int, is_wanted: Callable[[], bool]) -> None:
        """Returns when every byte is here."""
        gives_up_at = time.monotonic() + connection.SILENCE_TIMEOUT_S
        pause_s = 0.0
        is_done = self._agent.begin(handle)
        while not is_done:
            if not is_wanted():
                raise UnavailableError("the receiver gave the transfer up", reason="TRANSFER_ABORTED", stage="transfer")
            if time.monotonic() > gives_up_at:
                raise UnavailableError("the sender's memory does not answer", reason="SENDER_LOST", stage="transfer")
            time.sleep(pause_s)
            pause_s = min(pause_s + PAUSE_STEP_S, MAX_PAUSE_S)
            is_done = self._agent.is_done(handle)

    def _take_staging(self) -> Bytes:
        with self._lock:
            self._look_after_given_up()
            if self._free:
                return self._free.pop()
            num_set_aside = len(self._given_up) + len(self._lost)
            if num_set_aside >= MAX_SET_ASIDE:
                raise UnavailableError(
                    f"{num_set_aside} reads of transport nixl never ended; restart this worker, or leave nixl out of "
                    "--transports",
                    reason="NIXL_UNUSABLE",
                    stage="transfer",
                )
            staging = np.empty(self._staging_bytes(), np.uint8)
            with _as_unavailable("cannot register memory", reason="NIXL_UNUSABLE"):
                self._agent.register(staging.ctypes.data, len(staging))
            return staging

    def _give_back(self, staging: Bytes) -> None:
        with self._lock:
            self._free.append(staging)

    def _look_after_given_up(self) -> None:
        """Under the lock."""
        still: list[_Read] = []
        for read in self._given_up:
            try:
                if not self._agent.is_done(read.handle):
                    still.append(read)
                    continue
                self._agent.release(read.handle)
                self._free.append(read.staging)
            except Exception:
                self._lost.append(read.staging)
            self._let_go(read.peer)
        self._given_up = still

    def _let_go(self, peer: Peer) -> None:
        """Under the lock."""
        peer.num_users -= 1
        if not peer.num_users:
            del self._peers[peer.description]
            try:
                self._agent.remove_peer(peer.name)
            except Exception as error:
                log.warning("the library keeps a peer that is not needed: %s", error)


class _Agent:
    """The library, as far as it is used here; what it raises, it raises as it likes.

    Its own Python class is passed by: the thread with which that answers peers never sleeps, one processor core for
    each agent, and the delay that makes it wait for the network instead cannot be set there.

    Making one takes about a quarter of a second.
    """

    def __init__(self) -> None:
        from nixl_cu12 import _bindings as library

        self._library = library
        config = library.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.syncMode = library.NIXL_THREAD_SYNC_STRICT
        config.pthrDelay = PROGRESS_DELAY_US
        self._agent = library.nixlAgent(f"pdmesh-{secrets.token_hex(8)}", config)
        self._agent.createBackend("UCX", {})

    def register(self, address: int, num_bytes: int) -> None:
        memory = self._library.nixlRegDList(self._library.DRAM_SEG, [(address, num_bytes, 0, b"")])
        self._agent.registerMem(memory, [])

    def metadata(self) -> bytes:
        """Of all that is registered."""
        metadata: bytes = self._agent.getLocalMD()
        return metadata

    def add_peer(self, metadata: bytes) -> bytes:
        """Returns its name."""
        name: bytes = self._agent.loadRemoteMD(metadata)
        return name

    def remove_peer(self, name: bytes) -> None:
        self._agent.invalidateRemoteMD(name)

    def prepare_read(self, local: int, peer: bytes, remote: Sequence[int], num_bytes: int) -> int:
        """A handle for reading `num_bytes` at each of the peer's addresses, to lie end to end from `local` on."""
        here = [(local + place * num_bytes, num_bytes, 0) for place in range(len(remote))]
        there = [(address, num_bytes, 0) for address in remote]
        library = self._library
        handle: int = self._agent.createXferReq(
            library.NIXL_READ,
            library.nixlXferDList(library.DRAM_SEG, here),
            library.nixlXferDList(library.DRAM_SEG, there),
            peer,
            b"",
            [],
        )
        return handle

    def begin(self, handle: int) -> bool:
        """Whether it is done; raises if it failed."""
        return bool(self._agent.postXferReq(handle, b"") == self._library.NIXL_SUCCESS)

    def is_done(self, handle: int) -> bool:
        """Whether what was begun is done; raises if it failed."""
        return bool(self._agent.getXferStatus(handle) == self._library.NIXL_SUCCESS)

    def release(self, handle: int) -> None:
        """Only of a read that is done."""
        self._agent.releaseXferReq(handle)


@contextmanager
def _as_unavailable(what: str, *, reason: str) -> Iterator[None]:
    """Turns what the library raises, which has no common class, into UnavailableError."""
    try:
        yield
    except MeshError:
        raise
    except Exception as error:
        raise UnavailableError(f"{what}: {error}", reason=reason, stage="transfer") from error
