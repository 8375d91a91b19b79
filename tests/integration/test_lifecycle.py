"""A request that ends early, wherever it is, takes everything with it; one that cannot run is refused at once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from engine.local_engine import LocalEngine
from pdmesh.async_client import AsyncClient
from pdmesh.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
)
from pdmesh.generation import Chunk, Event
from pdmesh.sampling import SamplingParams
from tests.mesh import Mesh
from tests.tiny_models import VOCAB_SIZE

ENDLESS = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
# One token of a prompt per step of plain torch: 900 tokens take seconds, as a prompt and as an answer.
SLOW = {"max_prefill_chunk": 1, "kernels": "torch"}


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % (VOCAB_SIZE - 64) for i in range(length)]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a state that a test needs; failing here means that the state never came about."""
    try:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        pytest.fail(f"never saw: {what}")


@asynccontextmanager
async def streaming(client: AsyncClient, tokens: list[int]) -> AsyncIterator[list[Event]]:
    """A client that reads in the background until the body ends, and then leaves at once."""
    events: list[Event] = []

    async def read() -> None:
        async for event in client.stream(tokens=tokens, sampling=ENDLESS):
            events.append(event)

    reading = asyncio.create_task(read())
    try:
        yield events
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_client_leaves_while_queued(tiny_model: Path) -> None:
    async with Mesh(tiny_model, engine={**SLOW, "max_num_seqs": 1}) as mesh:
        engine = mesh.prefills[0].host.engine
        async with streaming(mesh.client, prompt(900)):
            await until(lambda: engine.load().num_running == 1, "the first prompt being computed")
            async with streaming(mesh.client, prompt(900, start=1)) as events:
                await until(lambda: engine.load().num_waiting == 1, "the second prompt queued")
            await until(lambda: engine.load().num_waiting == 0, "the queued prompt gone")
            assert engine.load().num_running == 1, "the first goes on"
            assert not any(isinstance(event, Chunk) for event in events)
        await mesh.assert_idle()


async def test_client_leaves_during_prefill(tiny_model: Path) -> None:
    async with Mesh(tiny_model, engine=SLOW) as mesh:
        engine = mesh.prefills[0].host.engine
        async with streaming(mesh.client, prompt(900)) as events:
            await until(lambda: engine.load().num_running == 1, "the prompt being computed")
            await until(lambda: mesh.decodes[0].host.status().num_tickets == 1, "a ticket for its KV")
        assert not any(isinstance(event, Chunk) for event in events)
        await mesh.assert_idle()


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
async def test_client_leaves_while_the_kv_waits_for_room(tiny_model: Path, transport: str) -> None:
    async with Mesh(tiny_model, transports=transport, engine={"num_blocks": 64}) as mesh:
        prefill, decode = mesh.prefills[0].host, mesh.decodes[0].host
        hog = await decode.engine.acquire_prefix(prompt(16), b"")
        await decode.engine.reserve(hog, 60)
        async with streaming(mesh.client, prompt(400)) as events:
            await until(lambda: any(isinstance(e, Chunk) for e in events), "the first token, before any KV moved")
            assert decode.status().num_tickets == 0, "no room: nothing is granted"
            assert prefill.engine.status().num_requests == 1, "the prefill worker keeps the KV"
        await until(lambda: prefill.engine.status().num_requests == 0, "the prefill worker rid of it")
        await decode.engine.release(hog)
        await mesh.assert_idle()


async def test_client_leaves_during_decode(tiny_model: Path) -> None:
    async with Mesh(tiny_model) as mesh:
        async with streaming(mesh.client, prompt(100)) as events:
            await until(lambda: sum(isinstance(event, Chunk) for event in events) >= 5, "five tokens")
            assert mesh.decodes[0].host.engine.load().num_running == 1
        await mesh.assert_idle()


async def test_a_request_waits_for_room_and_then_goes_on(tiny_model: Path) -> None:
    """Back-pressure is no failure: the KV waits on the prefill worker until the decode worker has blocks."""
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    async with Mesh(tiny_model, engine={"num_blocks": 64}) as mesh:
        expected = await mesh.client.generate(tokens=prompt(400), sampling=sampling, cache_salt="alone")
        decode = mesh.decodes[0].host.engine
        hog = await decode.acquire_prefix(prompt(16), b"")
        await decode.reserve(hog, 60)
        waiting = asyncio.create_task(mesh.client.generate(tokens=prompt(400), sampling=sampling))
        await until(lambda: decode.status().num_leases == 2, "a request waiting for blocks")
        await decode.release(hog)
        result = await waiting
        assert result.token_ids == expected.token_ids
        assert result.report.kv_bytes > 0
        await mesh.assert_idle()


async def test_deadline_ends_the_work_in_time(tiny_model: Path) -> None:
    async with Mesh(tiny_model, engine=SLOW) as mesh:
        with pytest.raises(DeadlineError):
            await mesh.client.generate(tokens=prompt(900), sampling=ENDLESS, timeout_s=0.2)
        await mesh.assert_idle()
        seen: list[Event] = []

        async def read() -> None:
            async for event in mesh.client.stream(tokens=prompt(8), sampling=ENDLESS, timeout_s=0.5):
                seen.append(event)

        with pytest.raises(DeadlineError):
            await read()
        assert any(isinstance(event, Chunk) for event in seen), "it was generating when its time was up"
        await mesh.assert_idle()


@contextmanager
def _untouched(mesh: Mesh) -> Iterator[None]:
    """No engine does anything meanwhile."""
    before = [worker.host.status().num_steps for worker in mesh.workers]
    yield
    assert [worker.host.status().num_steps for worker in mesh.workers] == before


async def test_what_can_never_run_is_refused_before_anything_is_allocated(tiny_model: Path) -> None:
    async with Mesh(tiny_model) as mesh:
        client = mesh.client
        with _untouched(mesh):
            with pytest.raises(InvalidRequestError, match="1024") as too_long:
                await client.generate(tokens=prompt(2000))
            assert too_long.value.reason == "PROMPT_TOO_LONG"
            for wrong in (
                {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0},
                {"max_tokens": 0}, {"n": 0}, {"n": 1000}, {"logprobs": 100}, {"repetition_penalty": 0.0},
                {"min_tokens": 9, "max_tokens": 3}, {"stop": ["x" * 10_000]}, {"logit_bias": {VOCAB_SIZE: 1.0}},
                {"stop_token_ids": [VOCAB_SIZE]},
            ):  # fmt: skip
                with pytest.raises(InvalidRequestError) as refused:
                    await client.generate("hello", **wrong)
                assert refused.value.stage == "admission", wrong
            with pytest.raises(NotFoundError, match="tiny"):
                await client.generate("hello", model="no-such-model")
            for empty in (client.generate(""), client.generate(tokens=[]), client.generate(messages=[])):
                with pytest.raises(InvalidRequestError):
                    await empty
            with pytest.raises(InvalidRequestError, match="1048576") as too_large:
                await client.generate("x" * 10_000_000)
            assert too_large.value.reason == "TEXT_TOO_LONG"
            with pytest.raises(InvalidRequestError):
                await client.generate(tokens=[VOCAB_SIZE])
        await mesh.assert_idle()


async def test_full_is_said_at_once(tiny_model: Path) -> None:
    async with Mesh(tiny_model, router={"max_active_requests": 2}) as mesh:
        async with streaming(mesh.client, prompt(8)), streaming(mesh.client, prompt(8, start=1)):
            await until(lambda: mesh.service.num_active_requests == 2, "two requests")
            with pytest.raises(OverloadedError) as full:
                await mesh.client.generate(tokens=prompt(8))
            assert full.value.retryable
        await mesh.assert_idle()
    async with Mesh(tiny_model, num_decode=2, max_requests=1) as mesh:
        async with streaming(mesh.client, prompt(8)) as first, streaming(mesh.client, prompt(8, start=1)) as second:
            await until(lambda: bool(first) and bool(second), "both running")
            await until(
                lambda: all(w.host.status().num_request_tasks for w in mesh.decodes), "a request on each worker"
            )
            with pytest.raises(OverloadedError):
                await mesh.client.generate(tokens=prompt(8))
        await mesh.assert_idle()


async def test_completions_share_the_prompt(tiny_model: Path) -> None:
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=16, n=4)
    async with Mesh(tiny_model) as mesh:
        result = await mesh.client.generate(tokens=prompt(200), sampling=sampling)
        assert len({completion.token_ids for completion in result.completions}) == 4, "four different answers"
        assert mesh.prefills[0].host.engine.status().num_steps == 1, "the prompt was computed once"
        for completion in result.completions[1:]:
            assert completion.usage.cached_tokens == 192, "the others found its full blocks"
        await mesh.assert_idle()


async def test_the_report_tells_of_the_hand_off_also_where_a_stop_string_ends_it(tiny_model: Path) -> None:
    async with Mesh(tiny_model) as mesh:
        whole = await mesh.client.generate(tokens=prompt(200), temperature=0.0, max_tokens=12, ignore_eos=True)
        stop = whole.text[len(whole.text) // 2 :][:3]
        result = await mesh.client.generate(
            tokens=prompt(200), temperature=0.0, max_tokens=12, ignore_eos=True, stop=[stop], cache_salt="again"
        )
        assert result.completions[0].matched_stop == stop
        assert result.text == whole.text[: whole.text.index(stop)]
        assert result.report.prefill_worker_id == "prefill-0"
        assert result.report.kv_bytes == 13 * mesh.decodes[0].host.engine.memory.block_bytes
        await mesh.assert_idle()


async def test_prompt_and_output_logprobs_are_the_same_wherever_they_are_computed(tiny_model: Path) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2)
    async with Mesh(tiny_model) as mesh:
        away = await mesh.client.generate(tokens=prompt(150), sampling=sampling)
        assert away.report.prefill_worker_id == "prefill-0"
        await mesh.prefills[0].close()
        here = await mesh.client.generate(tokens=prompt(150), sampling=sampling)
        assert here.report.prefill_worker_id == ""
        mesh.prefills.clear()
    assert len(away.prompt_logprobs) == 149
    for ours, theirs in (
        (away.prompt_logprobs, here.prompt_logprobs),
        (away.completions[0].logprobs, here.completions[0].logprobs),
    ):
        assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
        assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)


async def test_a_worker_whose_engine_has_died_leaves_instead_of_failing_every_request(tiny_model: Path) -> None:
    async with Mesh(tiny_model, num_decode=2) as mesh:
        broken, whole = mesh.decodes
        engine = broken.host.engine
        assert isinstance(engine, LocalEngine)

        def defect(scheduler: object) -> None:
            raise ZeroDivisionError("a defect in the bookkeeping itself; none is known, so it is made by hand")

        engine._thread.post(defect)
        async with asyncio.timeout(5):
            with pytest.raises(InternalError):
                await broken.drain_asked()
        await broken.close()
        mesh.decodes.remove(broken)
        result = await mesh.client.generate(tokens=prompt(100), temperature=0.0, max_tokens=4)
        assert result.report.decode_worker_id == whole.host.worker_id
        await mesh.assert_idle()
