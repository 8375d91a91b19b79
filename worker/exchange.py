"""What every worker has of others' KV and gives them of its own, wired together."""

from collections.abc import Sequence

from engine.api import Engine
from kvstore.directory import Directory
from kvstore.exchange.fetching import BlockFetcher
from kvstore.exchange.putting import BlockPutter
from kvstore.exchange.servicer import SERVICE, FetchServicer
from kvstore.nodes.arrival import ReceivingNodes
from kvstore.nodes.departure import SendingNodes
from kvstore.transfer.receiver import ReceiverHub
from kvstore.transfer.senders import KVSenders
from pdmesh.channels import ChannelPool
from pdmesh.config import ServiceConfig
from pdmesh.v1 import kv_blocks_pb2_grpc
from worker.costs import Speeds
from worker.host import WorkerHost
from worker.memory import EngineMemory
from worker.prefixes import Prefixes
from worker.shelf import EngineShelf
from worker.store_feed import StoreFeed


class WorkerExchange:
    """Owns the worker's channels to others, its senders and its receivers.

    Attributes:
        channels: To other processes.
        hub: Receives KV.
        senders: Send it.
        receiving, sending: All nodes of the worker, as they do so.
        prefixes: Brings the beginnings of prompts.
        feed: Gives stores what was computed here.
    """

    def __init__(
        self, host: WorkerHost, engine: Engine, directory: Directory, listen: ServiceConfig, transports: Sequence[str]
    ) -> None:
        memory = EngineMemory(engine)
        self.channels = ChannelPool()
        self.hub = ReceiverHub(memory, transports, host.server, listen.host, listen.advertised_host, host.journal)
        host.num_tickets = lambda: self.hub.num_open_tickets
        self.senders = KVSenders(memory, host.incarnation, self.channels.get, host.journal, transports)
        self.receiving = ReceivingNodes(lambda: engine.kv_nodes, self.hub, self.channels, host.journal, engine.give_up)
        self.sending = SendingNodes(
            lambda: engine.kv_nodes, memory, self.senders, host.incarnation, self.channels, engine.give_up
        )
        self._fetcher = BlockFetcher(host.worker_id, self.hub, host.journal, self.channels)
        speeds = Speeds(lambda: engine.status().prefill_token_s)
        self.prefixes = Prefixes(engine, lambda: host.tiers, self._fetcher, speeds)
        putter = BlockPutter(host.worker_id, host.incarnation, self.senders, self.channels)
        self.feed = StoreFeed(engine, directory, putter)
        shelf = EngineShelf(engine, lambda: host.info.facts, self.prefixes)
        servicer = FetchServicer(shelf, host.incarnation, self.senders)
        host.server.add(kv_blocks_pb2_grpc.add_KVBlocksServicer_to_server, servicer, SERVICE)

    async def start(self) -> None:
        """Before the engine: others may be told where to send."""
        await self.hub.start()

    async def aclose(self) -> None:
        """After the last request."""
        await self.feed.aclose()
        await self._fetcher.aclose()
        await self.hub.aclose()
        await self.senders.aclose()
        await self.channels.aclose()
