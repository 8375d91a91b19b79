"""Where node 0's supervisor meets the others, before every generation anew.

    other node -> node 0    hello       who it is, what it was told to run
    node 0 -> other node    refused     that does not fit: it exits, a person must mend something
                            start       all are there: start your ranks
                            ready       rank 0 serves
                            drains      rank 0 was asked to end
    other node -> node 0    ended       one of its ranks has ended
                            stop        how often it was told to stop
    node 0 -> other node    down        the generation ends, why, and whether another follows

A connection serves one generation; its node comes back with a new one when its ranks are gone. There is no
authentication: the network between the nodes is trusted, as torch.distributed trusts it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from pdmesh.errors import ConfigError, UnavailableError
from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.generation import GroupEnd
from pdmesh.ranks.hello import Hello
from pdmesh.ranks.link import SILENCE_S, Link, Message

log = logging.getLogger(__name__)

_REMIND_S = 10.0
# A node that comes back finds the place of its lost connection free before this; only another of its number keeps it.
_TAKEN_S = 2 * SILENCE_S


class Peer:
    """Another node, as node 0 sees it for one generation.

    Attributes:
        ended: Resolved when a rank of it has ended or it is lost.
        left: Set when its connection has ended and its place is free.
    """

    def __init__(self, node_rank: int, link: Link) -> None:
        self.node_rank = node_rank
        self.link = link
        self.name = f"node {node_rank} ({link.peer_host})"
        self.ended: asyncio.Future[GroupEnd] = asyncio.get_running_loop().create_future()
        self.left = asyncio.Event()

    def end(self, end: GroupEnd) -> None:
        """Its first end counts."""
        if not self.ended.done():
            self.ended.set_result(end)


class Rendezvous:
    """Node 0's side. `open`, then `gathered` before each generation; `aclose` frees everything.

    Args:
        config: Node 0's.
        hello: What node 0 would say of itself.
        on_stop: Called when another node was told to stop, with how often it was.
    """

    def __init__(self, config: GroupConfig, hello: Hello, on_stop: Callable[[int], None]) -> None:
        self._config, self._hello, self._on_stop = config, hello, on_stop
        self._peers: dict[int, Peer] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> str:
        """Listens; returns the IP address at which. Raises ConfigError where it cannot be had."""
        host, port = self._config.leader_host, self._config.rendezvous_port
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: Link(self._welcome), host, port)
        except OSError as error:
            raise ConfigError(
                f"node 0 cannot listen at --rendezvous {self._config.rendezvous} ({error.strerror or error}): name an "
                "address of this machine and a free port"
            ) from error
        return str(self._server.sockets[0].getsockname()[0])

    async def aclose(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def gathered(self) -> list[Peer]:
        """Returns when every other node is there, in order; says now and then whom it waits for."""
        while True:
            present = {node_rank: peer for node_rank, peer in self._peers.items() if not peer.link.lost}
            missing = [node_rank for node_rank in range(1, self._config.nnodes) if node_rank not in present]
            if not missing:
                return [present[node_rank] for node_rank in sorted(present)]
            log.info("waiting at %s for --node-rank %s", self._config.rendezvous, ", ".join(map(str, missing)))
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REMIND_S):
                    await self._changed.wait()

    def _welcome(self, link: Link) -> None:
        task = asyncio.create_task(self._attend(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attend(self, link: Link) -> None:
        """Whatever one connection brings, until it ends."""
        host = link.peer_host
        try:
            # Who only beats is nobody.
            async with asyncio.timeout(SILENCE_S):
                message = await link.receive()
            hello = Hello.from_message(message)
            self._hello.check(hello)
            await self._serve(hello.node_rank, link)
        except ConfigError as error:
            log.error("refused a node at %s: %s", host, error.message)
            link.send({"refused": error.message})
        except (UnavailableError, TimeoutError) as error:
            log.info("a connection from %s never joined: %s", host, str(error) or "it said nothing")
        finally:
            link.close()

    async def _serve(self, node_rank: int, link: Link) -> None:
        """Keeps a node's place while its connection lives. Raises ConfigError where another has it."""
        await self._place_free(node_rank)
        self._peers[node_rank] = peer = Peer(node_rank, link)
        self._changed.set()
        try:
            while True:
                self._take(peer, await link.receive())
        except UnavailableError as error:
            peer.end(GroupEnd(f"{peer.name} is lost: {error.message}", 1))
        finally:
            peer.end(GroupEnd(f"{peer.name} is lost", 1))
            del self._peers[node_rank]
            peer.left.set()
            self._changed.set()

    async def _place_free(self, node_rank: int) -> None:
        try:
            async with asyncio.timeout(_TAKEN_S):
                while (holder := self._peers.get(node_rank)) is not None:
                    await holder.left.wait()
        except TimeoutError as error:
            raise ConfigError(
                f"--node-rank {node_rank} is taken by {self._peers[node_rank].name}: give every node one of its own"
            ) from error

    def _take(self, peer: Peer, message: Message) -> None:
        """Raises UnavailableError for what no supervisor says."""
        match message:
            case {"stop": int(count)}:
                self._on_stop(count)
            case {"ended": {"reason": str(reason), "exit_code": int(exit_code), "fatal": bool(fatal)}}:
                peer.end(GroupEnd(f"{peer.name}: {reason}", exit_code, fatal))
            case _:
                raise UnavailableError("it sent what no supervisor sends")
