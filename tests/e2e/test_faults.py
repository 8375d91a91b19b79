"""Processes die under traffic: no request fails, no token changes, nothing stays behind. Each fault is proven."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pdmesh.generation import GenerationResult
from pdmesh.sampling import SamplingParams
from tests.processes import ProcessMesh, kill, standing_still
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.e2e


@dataclass
class Traffic:
    """Clients that send known requests over and over and compare every answer with the undisturbed one."""

    mesh: ProcessMesh
    num_clients: int = 8
    num_tokens: int = 60
    results: list[GenerationResult] = field(default_factory=list)

    async def learn(self) -> None:
        """What each request is answered when nothing goes wrong."""
        draw = random.Random(11)
        self.requests = [
            (
                [draw.randrange(VOCAB_SIZE - 64) for _ in range(length)],
                SamplingParams(temperature=temperature, seed=length, max_tokens=self.num_tokens, ignore_eos=True),
            )
            for length in (5, 90, 150, 300, 500)
            for temperature in (0.0, 0.9)
        ]
        self.expected = [(await self._ask(number)).token_ids for number in range(len(self.requests))]

    async def _ask(self, number: int) -> GenerationResult:
        tokens, sampling = self.requests[number]
        # A salt of its own each time: every prompt is computed anew, and its KV moves.
        salt = str(random.random())
        return await self.mesh.client.generate(tokens=tokens, sampling=sampling, cache_salt=salt, timeout_s=60)

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Clients run during the body and finish after it; a failed or different answer raises."""
        stop = asyncio.Event()

        async def client(number: int) -> None:
            while not stop.is_set():
                request = number % len(self.requests)
                result = await self._ask(request)
                assert result.token_ids == self.expected[request], f"request {request} was answered differently"
                self.results.append(result)
                number += 1

        async with asyncio.TaskGroup() as clients:
            for number in range(self.num_clients):
                clients.create_task(client(number))
            await self.until_answered(10)
            yield
            await self.until_answered(20)
            stop.set()

    async def until_answered(self, num_more: int) -> None:
        goal = len(self.results) + num_more
        async with asyncio.timeout(60):
            while len(self.results) < goal:
                await asyncio.sleep(0.02)


async def test_a_prefill_worker_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(tiny_model, tmp_path, num_prefill=2) as mesh:
        traffic = Traffic(mesh)
        await traffic.learn()
        async with traffic.flowing():
            before = {result.report.prefill_worker_id for result in traffic.results}
            assert "prefill-0" in before, "it has work"
            await kill(mesh.prefills[0])
            traffic.results.clear()
            await traffic.until_answered(30)
            # The directory forgets it after five seconds; the router was told by the first request that it failed.
            assert sum(result.report.prefill_retries for result in traffic.results) <= 2 * traffic.num_clients
        assert "prefill-1" in {result.report.prefill_worker_id for result in traffic.results}
        await mesh.assert_idle()


async def test_the_last_prefill_worker_is_killed_and_started_again(tiny_model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(tiny_model, tmp_path) as mesh:
        traffic = Traffic(mesh)
        await traffic.learn()
        killed = (await mesh.workers())["prefill-0"].info.incarnation

        async def back() -> bool:
            view = (await mesh.workers()).get("prefill-0")
            return view is not None and view.info.incarnation != killed and not view.excluded_because

        async with traffic.flowing():
            await kill(mesh.prefills[0])
            traffic.results.clear()
            await traffic.until_answered(20)
            assert "" in {result.report.prefill_worker_id for result in traffic.results}, "decode computes prompts"
            assert await mesh.serving()
            await mesh.prefills[0].start()
            await mesh.until(back, "the prefill worker back", 30)
            traffic.results.clear()
        assert "prefill-0" in {result.report.prefill_worker_id for result in traffic.results}
        await mesh.assert_idle()


async def test_a_decode_worker_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(tiny_model, tmp_path, num_decode=2) as mesh:
        traffic = Traffic(mesh, num_clients=16, num_tokens=200)
        await traffic.learn()
        async with traffic.flowing():

            async def generating() -> bool:
                return (await mesh.status("decode-0")).num_requests >= 4

            await mesh.until(generating, "requests on the worker that is about to die")
            await kill(mesh.decodes[0])
            await traffic.until_answered(20)
        assert sum(result.report.decode_resumes for result in traffic.results) > 0, "a stream changed workers"
        await mesh.assert_idle()


@pytest.mark.parametrize("role", [pytest.param("prefill", marks=pytest.mark.slow), "decode"])
async def test_a_worker_stands_still(tiny_model: Path, tmp_path: Path, role: str) -> None:
    """Its kernel goes on acknowledging what it is sent; nobody waits for it longer than for a dead one."""
    async with ProcessMesh(tiny_model, tmp_path, num_prefill=2, num_decode=2) as mesh:
        traffic = Traffic(mesh, num_clients=8, num_tokens=100)
        await traffic.learn()
        worker = (mesh.prefills if role == "prefill" else mesh.decodes)[0]

        async def at_work() -> bool:
            return (await mesh.status(worker.name)).num_requests >= 1

        async with traffic.flowing():
            await mesh.until(at_work, "requests on the worker that is about to stand still")
            with standing_still(worker):
                # Each of these clients asked after the stop, or was on that worker and went on elsewhere.
                await traffic.until_answered(4 * traffic.num_clients)
            await mesh.until(mesh.all_ready, "the worker back in the directory", 15)
            await traffic.until_answered(20)
        await mesh.assert_idle()


async def test_redis_is_killed_and_comes_back_empty(tiny_model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(tiny_model, tmp_path, num_prefill=2, num_decode=2) as mesh:
        traffic = Traffic(mesh)
        await traffic.learn()
        async with traffic.flowing():
            pid = mesh.valkey.pid
            mesh.valkey.kill()
            await traffic.until_answered(30)
            mesh.valkey.restart_empty()
            assert mesh.valkey.pid != pid, "another server, with nothing in it"
            await traffic.until_answered(10)
            await mesh.until(mesh.all_ready, "every worker in the directory again", 5)
            ages = [view.age_s for view in (await mesh.workers()).values()]
            assert max(ages) < 5, "the directory has heard of every worker since"
        assert {result.report.prefill_worker_id for result in traffic.results} >= {"prefill-0", "prefill-1"}
        await mesh.assert_idle()
