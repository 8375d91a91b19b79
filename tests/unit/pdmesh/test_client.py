"""Both clients against a real server."""

import asyncio

import pytest

from pdmesh import AsyncClient, Client
from pdmesh.errors import DeadlineError, InvalidRequestError, OverloadedError, UnavailableError
from pdmesh.generation import Chunk, Complete, RequestReport, Started, Usage
from pdmesh.types import FinishReason, Role, WorkerState
from tests.unit.pdmesh.conftest import EchoServer


async def test_generate_adds_the_stream_up(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        result = await client.generate("abc", seed=7)
    assert (result.text, result.token_ids) == ("abc", (97, 98, 99))
    assert (result.request_id, result.model, result.seed) == ("r1", "echo", 7)
    assert result.finish_reason is FinishReason.STOP
    assert result.completions[0].matched_stop == "!"
    assert result.usage == Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=2)
    assert result.report == RequestReport(decode_worker_id="w", ttft_s=0.25)


async def test_each_completion_is_kept_apart_and_usage_counts_the_prompt_once(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        result = await client.generate("ab", n=3)
    assert [completion.text for completion in result.completions] == ["ab", "ab", "ab"]
    assert result.usage == Usage(prompt_tokens=3, completion_tokens=6, cached_tokens=2)


async def test_stream_gives_the_events_in_order(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        events = [event async for event in client.stream("ab")]
    assert [type(event) for event in events] == [Started, Chunk, Chunk, Complete]
    assert [event.first_token_index for event in events if isinstance(event, Chunk)] == [0, 1]


async def test_the_sync_client_gives_what_the_async_one_gives(echo: EchoServer) -> None:
    def talk() -> object:
        with Client(echo.address) as client:
            return client.generate("abc"), list(client.stream("abc")), client.tokenize("abc"), client.workers()

    async with AsyncClient(echo.address) as client:
        events = [event async for event in client.stream("abc")]
        expected = await client.generate("abc"), events, await client.tokenize("abc"), await client.workers()
    assert await asyncio.to_thread(talk) == expected


async def test_leaving_an_async_stream_cancels_it_at_the_server(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        stream = client.stream("forever")
        async for event in stream:
            if isinstance(event, Chunk):
                break
        await stream.aclose()
        await asyncio.wait_for(echo.inference.cancelled.wait(), 5)


async def test_dropping_an_async_stream_cancels_it_too(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        async for event in client.stream("forever"):
            if isinstance(event, Chunk):
                break
        await asyncio.wait_for(echo.inference.cancelled.wait(), 5)


async def test_breaking_out_of_a_sync_stream_cancels_it_at_the_server(echo: EchoServer) -> None:
    def leave_early(client: Client) -> None:
        for event in client.stream("forever"):
            if isinstance(event, Chunk):
                break

    with Client(echo.address) as client:
        await asyncio.to_thread(leave_early, client)
        await asyncio.wait_for(echo.inference.cancelled.wait(), 5)


async def test_a_refusal_comes_as_the_servers_error(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        with pytest.raises(OverloadedError, match="no room for you") as raised:
            await client.generate("full")
    assert (raised.value.stage, raised.value.details, raised.value.retryable) == ("admission", {"limit": "8"}, True)


async def test_the_sync_client_raises_the_servers_error(echo: EchoServer) -> None:
    with Client(echo.address) as client, pytest.raises(OverloadedError, match="no room for you"):
        await asyncio.to_thread(client.generate, "full")


async def test_time_up_is_a_deadline_error_and_ends_the_work(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        with pytest.raises(DeadlineError):
            await client.generate("forever", timeout_s=0.2)
        await asyncio.wait_for(echo.inference.cancelled.wait(), 5)


async def test_where_nobody_listens_the_error_says_what_to_do(unused_tcp_port: int) -> None:
    async with AsyncClient(f"127.0.0.1:{unused_tcp_port}") as client:
        with pytest.raises(UnavailableError, match="pdmesh up") as raised:
            await client.models()
    assert raised.value.reason == "NO_CONNECTION"


async def test_the_smaller_calls(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        assert await client.tokenize(messages=[{"role": "user", "content": "!"}]) == tuple(map(ord, "user!"))
        assert await client.detokenize([104, 105]) == "hi"
        assert [model.name for model in await client.models()] == ["echo"]
        info = await client.server_info()
        (view,) = await client.workers()
        status = await client.worker_status("w")
        await client.drain("w")
    assert (status.info.worker_id, status.ranks) == ("w", ())
    assert (info.version, info.max_active_requests, info.limits.max_n) == ("1.2.3", 8, 16)
    assert (view.info.role, view.info.state, view.info.loaded_bytes) == (Role.DECODE, WorkerState.LOADING, 1)
    assert (view.age_s, view.excluded_because) == (0.5, "loading")
    assert echo.cluster.drained == ["w"]


async def test_a_bad_argument_is_told_before_anything_is_sent(echo: EchoServer) -> None:
    async with AsyncClient(echo.address) as client:
        with pytest.raises(InvalidRequestError, match="exactly one of"):
            client.stream("text", tokens=[1])
    assert echo.inference.requests == []


def test_a_client_may_be_made_before_the_loop_runs() -> None:
    client = AsyncClient("127.0.0.1:1")

    async def use() -> None:
        async with client:
            with pytest.raises(UnavailableError):
                await client.models()

    asyncio.run(use())
