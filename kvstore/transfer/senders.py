"""The sending side, as a prefill worker uses it: the right sender for a grant."""

from collections.abc import Callable, Sequence

import grpc

from kvstore.transfer.base import BlockMemory, Grant, KVSender
from kvstore.transfer.grpc_transport import GrpcSender
from kvstore.transfer.tcp import TcpConnectionPool, TcpSender
from pdmesh.errors import PreconditionError

# Every transport, best first.
TRANSPORTS = ("tcp", "grpc")


def choose_transport(offered: Sequence[str], supported: Sequence[str] = TRANSPORTS) -> str:
    """The first of `offered`, which lists the receiver's best first, that is supported here."""
    for name in offered:
        if name in supported:
            return name
    raise PreconditionError(
        f"no transport in common: offered {', '.join(offered) or 'none'}, supported {', '.join(supported)}",
        reason="NO_COMMON_TRANSPORT",
        stage="transfer",
    )


class KVSenders:
    """Makes the senders of one worker; owns its pooled connections, not its channels.

    Args:
        memory: Where the blocks lie.
        incarnation: This process's; tickets are bound to it.
        channel_for: The gRPC channel to an address.
    """

    def __init__(self, memory: BlockMemory, incarnation: str, channel_for: Callable[[str], grpc.aio.Channel]) -> None:
        self._memory = memory
        self._incarnation = incarnation
        self._channel_for = channel_for
        self._tcp_pool = TcpConnectionPool()

    def sender(self, grant: Grant, request_id: str) -> KVSender:
        """A sender for one grant. Raises PreconditionError for a transport that is not ours."""
        if choose_transport([grant.transport]) == "tcp":
            return TcpSender(self._memory, grant, request_id, self._incarnation, self._tcp_pool)
        channel = self._channel_for(grant.address)
        return GrpcSender(self._memory, grant, request_id, self._incarnation, channel)

    async def aclose(self) -> None:
        """Closes pooled connections and ends the threads; every sender is to be closed before."""
        await self._tcp_pool.aclose()
