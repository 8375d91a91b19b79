"""A prefill worker learns who has computed the beginning of its prompt, and computes the same tokens all the same."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pdmesh.hashing import block_hashes, root_hash
from pdmesh.sampling import SamplingParams
from pdmesh.types import KVSource, WorkerState
from prefill.worker import Event, Message, PrefillWorker, Prompt
from tests.directory_stores import View, eventually, watching
from tests.mesh import Mesh
from tests.tiny_models import VOCAB_SIZE

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """What prefill workers are asked for, in order; they go on to compute it."""
    asked: list[Prompt] = []
    run = PrefillWorker.run

    async def noting(
        self: PrefillWorker, prompt: Prompt, messages: AsyncIterator[Message], emit: Callable[[Event], None]
    ) -> None:
        asked.append(prompt)
        await run(self, prompt, messages, emit)

    monkeypatch.setattr(PrefillWorker, "run", noting)
    return asked


async def test_a_worker_without_the_prefix_is_told_who_has_it(tiny_model: Path, prompts: list[Prompt]) -> None:
    tokens = [(7 * i) % (VOCAB_SIZE - 64) for i in range(400)]
    beginning = tokens[:200]
    async with Mesh(tiny_model) as mesh:
        (decode,), (first,) = mesh.decodes, mesh.prefills
        await mesh.client.generate(tokens=beginning, sampling=GREEDY)
        assert prompts[-1].sources == (), "nobody had anything"
        hashes = set(block_hashes(beginning, decode.host.engine.facts.block_size, root_hash()))
        view = View()
        async with watching(mesh.directory, view):
            await eventually(lambda: all(view.blocks[worker.host.worker_id] >= hashes for worker in mesh.workers))
        second = await mesh.add_prefill()
        # What the directory was told after the blocks, the router cannot know before them.
        await first.drain()
        await _until_router_sees(mesh, first.host.worker_id, WorkerState.DRAINING)
        await _until_router_sees(mesh, second.host.worker_id, WorkerState.READY)
        result = await mesh.client.generate(tokens=tokens, sampling=GREEDY)
        assert result.report.prefill_worker_id == second.host.worker_id
        assert prompts[-1].sources == tuple(
            KVSource(worker.host.worker_id, worker.host.incarnation, worker.host.info.address, len(hashes))
            for worker in (decode, first)
        )
        alone = await mesh.client.generate(tokens=tokens, sampling=GREEDY, cache_salt="alone")
        assert prompts[-1].sources == (), "another tenant's blocks are of no use"
        assert result.token_ids == alone.token_ids
        await mesh.assert_idle()


async def _until_router_sees(mesh: Mesh, worker_id: str, state: WorkerState) -> None:
    async with asyncio.timeout(10):
        while (worker_id, state) not in [(v.info.worker_id, v.info.state) for v in await mesh.client.workers()]:
            await asyncio.sleep(0.02)
