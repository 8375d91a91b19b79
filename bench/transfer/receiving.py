"""The receiving process: `python -m bench.transfer.receiving NUM_BLOCKS BLOCK_BYTES`. One JSON object a line:

first, unasked                                -> {"tcp": …, "unix": …, "grpc": …}: addresses of the bare ends
{"expect": transport, "blocks": n}            -> {"ticket": hex, "epoch": e, "address": …}
{"wait": true}                                -> {"bytes": n}, when what was expected is there
{"cpu": true}                                 -> {"cpu_s": seconds of processor time so far}
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import uvloop
from prometheus_client import CollectorRegistry

from bench.transfer.bare import BareSockets, BareStreams
from bench.transfer.memory import PlainMemory
from kvstore.transfer.journal import TransferJournal
from kvstore.transfer.receiver import IncomingTransfer, ReceiverHub
from kvstore.transfer.transports import TRANSPORTS
from pdmesh.channels import SERVER_OPTIONS
from pdmesh.hashing import HASH_BYTES, BlockHash
from pdmesh.server import GrpcServer

REQUEST_ID, EPOCH, INCARNATION = "bench", 1, "bench-sender"
_HOST = "127.0.0.1"


def new_journal() -> TransferJournal:
    return TransferJournal(CollectorRegistry())


def hashes(num_blocks: int) -> list[BlockHash]:
    """Identities for blocks whose content is nobody's."""
    return [BlockHash(place.to_bytes(HASH_BYTES, "little")) for place in range(num_blocks)]


class _Receiving:
    def __init__(self, memory: PlainMemory) -> None:
        self._memory = memory
        self._server = GrpcServer(_HOST, 0)
        self._hub = ReceiverHub(memory, TRANSPORTS, self._server, _HOST, _HOST, new_journal())
        self._sockets = BareSockets(memory.bytes)
        self._bare = grpc.aio.server(options=SERVER_OPTIONS)
        self._bare.add_generic_rpc_handlers((BareStreams(memory.bytes),))
        self._incoming: IncomingTransfer | None = None

    async def serve(self) -> None:
        """Until stdin ends."""
        await self._server.start()
        await self._hub.start()
        port = self._bare.add_insecure_port(f"{_HOST}:0")
        await self._bare.start()
        try:
            _reply({**self._sockets.addresses, "grpc": f"{_HOST}:{port}"})
            while line := await asyncio.to_thread(sys.stdin.readline):
                _reply(await self._answer(json.loads(line)))
        finally:
            await self._hub.aclose()
            await self._server.stop()
            await self._bare.stop(None)
            self._sockets.close()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "expect" in request:
            block_ids = range(request["blocks"])
            self._incoming = self._hub.expect(
                REQUEST_ID, EPOCH, "bench", INCARNATION, block_ids, hashes(len(block_ids)), request["expect"]
            )
            grant = self._incoming.grant
            return {"ticket": grant.ticket.hex(), "epoch": grant.epoch, "address": grant.address}
        if "wait" in request:
            assert self._incoming is not None, "expect comes first"
            async with self._incoming as incoming:
                return {"bytes": (await incoming.wait()).num_bytes}
        return {"cpu_s": time.process_time()}


def _reply(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


async def _main(num_blocks: int, block_bytes: int) -> None:
    await _Receiving(PlainMemory(num_blocks, block_bytes, lend=False)).serve()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), int(sys.argv[2])))
