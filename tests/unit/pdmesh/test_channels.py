"""Connections as channels make them."""

import asyncio

from pdmesh.channels import ChannelPool
from pdmesh.health import is_serving
from tests.unit.pdmesh.conftest import EchoServer

# Longer than the first pauses between attempts to connect.
_BUSY_S = 0.4


async def test_a_peer_that_is_slow_to_take_a_connection_is_reached_at_the_first_attempt(echo: EchoServer) -> None:
    await echo.grpc.set_serving(True)
    host, _, port = echo.address.rpartition(":")
    num_connections = 0
    copying: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await asyncio.sleep(_BUSY_S)
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        for pair in ((reader, up_writer), (up_reader, writer)):
            copying.add(asyncio.create_task(copy(*pair)))

    channels = ChannelPool()
    busy = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    try:
        assert await is_serving(channels.get(f"127.0.0.1:{busy.sockets[0].getsockname()[1]}"))
        assert num_connections == 1
    finally:
        await channels.aclose()
        await asyncio.gather(*copying, return_exceptions=True)
        busy.close()
