"""The life of a gRPC server: health, errors, counting, drain; and of the process around it."""

import asyncio
import gc
import os
import signal
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdmesh import AsyncClient
from pdmesh.channels import ChannelPool
from pdmesh.errors import ConfigError, InternalError, UnavailableError
from pdmesh.generation import Chunk
from pdmesh.health import is_serving
from pdmesh.server import GrpcServer, run
from tests.unit.pdmesh.conftest import EchoServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def check(channel: grpc.aio.Channel, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request)  # type: ignore[attr-defined]
    return int(response.status)


async def test_health_follows_serving_for_the_process_and_each_service(echo: EchoServer) -> None:
    channels = ChannelPool()
    channel = channels.get(echo.address)
    seen = []
    for serving in (None, True, False):
        if serving is not None:
            await echo.grpc.set_serving(serving)
        seen.append([await check(channel, name) for name in ("", "pdmesh.v1.Inference", "pdmesh.v1.Cluster")])
    await channels.aclose()
    assert seen == [[NOT_SERVING] * 3, [SERVING] * 3, [NOT_SERVING] * 3]


async def test_is_serving(echo: EchoServer, unused_tcp_port: int) -> None:
    channels = ChannelPool()
    assert not await is_serving(channels.get(echo.address))
    await echo.grpc.set_serving(True)
    assert await is_serving(channels.get(echo.address))
    assert not await is_serving(channels.get(f"127.0.0.1:{unused_tcp_port}"))
    await channels.aclose()


async def test_a_defect_reaches_the_client_without_its_innards(
    echo: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    # Nothing can turn this into text: chr() raises ValueError in the servicer.
    async with AsyncClient(echo.address) as client:
        with pytest.raises(InternalError) as raised:
            await client.detokenize([0x110000])
    assert "chr()" not in raised.value.message
    assert "chr()" in caplog.text


async def test_calls_are_counted_while_they_run_and_drained_waits_for_them(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        stream = client.stream("forever")
        async for event in stream:
            if isinstance(event, Chunk):
                break
        assert echo.grpc.num_active_calls == 1
        drained = asyncio.create_task(echo.grpc.drained())
        # Calls about the server do not count, and are answered meanwhile.
        assert len(await client.workers()) == 1
        assert echo.grpc.num_active_calls == 1
        assert not drained.done()
        await stream.aclose()
        await asyncio.wait_for(drained, 5)
    assert echo.grpc.num_active_calls == 0


async def test_a_failed_call_is_counted_out(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        with pytest.raises(InternalError):
            await client.detokenize([0x110000])
    await asyncio.wait_for(echo.grpc.drained(), 5)
    assert echo.grpc.num_active_calls == 0


async def test_two_servers_never_share_a_port(echo: EchoServer) -> None:
    port = int(echo.address.rpartition(":")[2])
    second = GrpcServer("127.0.0.1", port)
    with pytest.raises(ConfigError, match="Choose another --port"):
        await second.start()
    await second.stop()


async def test_the_address_is_what_is_advertised() -> None:
    server = GrpcServer("127.0.0.1", 0, advertise="localhost")
    await server.start()
    host, _, port = server.address.partition(":")
    assert host == "localhost"
    with socket.create_connection(("127.0.0.1", int(port))):
        pass
    await server.stop()


class SteppedService:
    """Notes the steps of its life, and sends its own process the signals that a test asks for."""

    def __init__(self, steps: list[str], *, in_start: Exception | None = None, insist: bool = False) -> None:
        self.steps = steps
        self._in_start = in_start
        self._insist = insist
        self._closed = asyncio.Event()

    async def start(self) -> None:
        self.steps.append("start")
        if self._in_start is not None:
            raise self._in_start
        os.kill(os.getpid(), signal.SIGTERM)

    async def drain_asked(self) -> None:
        await self._closed.wait()
        raise UnavailableError("closed")

    async def drain(self) -> None:
        self.steps.append("drain")
        if self._insist:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()

    async def close(self) -> None:
        self.steps.append("close")
        self._closed.set()
        await asyncio.sleep(0)


def test_a_signal_drains_and_closes() -> None:
    steps: list[str] = []
    run(lambda: SteppedService(steps), drain_s=5)
    assert steps == ["start", "drain", "close"]


def test_a_second_signal_ends_the_drain() -> None:
    steps: list[str] = []
    run(lambda: SteppedService(steps, insist=True), drain_s=60)
    assert steps == ["start", "drain", "close"]


def test_what_a_person_must_mend_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[str] = []
    with pytest.raises(SystemExit) as raised:
        run(lambda: SteppedService(steps, in_start=ConfigError("no such model")), drain_s=5)
    assert raised.value.code == 2
    assert capsys.readouterr().err == "pdmesh: no such model\n"
    # The traceback holds the tasks; they tell when they go.
    del raised
    gc.collect()
    assert caplog.text == "", "a task's end that nobody looked at"
    assert steps == ["start", "close"]
