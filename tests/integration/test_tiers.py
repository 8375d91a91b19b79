"""KV that left a worker's cache comes back: from its tiers, another worker, a store; with it, the same tokens."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from kvstore.tiers.config import TierConfig
from pdmesh.config import ServiceConfig
from pdmesh.hashing import block_hashes, root_hash
from pdmesh.sampling import SamplingParams
from pdmesh.types import WorkerState
from prefill.service import PrefillService
from tests.directory_stores import eventually
from tests.mesh import Mesh
from tests.tiny_models import VOCAB_SIZE
from worker.costs import Speeds

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SIZE = 16


@pytest.fixture(autouse=True)
def computing_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model computes a prompt sooner than a disk or another process brings it, and then it should; not here."""
    monkeypatch.setattr(Speeds, "compute_s", lambda self, num_tokens: 1.0 * num_tokens)


def prompt(seed: int, num_tokens: int = 400) -> list[int]:
    return [(seed * 31 + 7 * i) % (VOCAB_SIZE - 64) for i in range(num_tokens)]


async def ask(mesh: Mesh, tokens: list[int]) -> tuple[list[int], int]:
    """The tokens that come, and how many of the prompt's were not computed."""
    result = await mesh.client.generate(tokens=tokens, sampling=GREEDY)
    return list(result.token_ids), result.usage.cached_tokens


@asynccontextmanager
async def store(mesh: Mesh, **tiers: object) -> AsyncIterator[StoreService]:
    config = StoreConfig(ServiceConfig(), TierConfig(**{"kv_host_gib": 0.05, **tiers}), "store-0")  # type: ignore[arg-type]
    service = StoreService(config, mesh.directory)
    try:
        await service.start()
        yield service
    finally:
        await service.close()


async def leave(mesh: Mesh, worker: PrefillService) -> None:
    """Drains a worker; returns when the router sends nothing there."""
    await worker.drain()
    async with asyncio.timeout(10):
        while True:
            views = {view.info.worker_id: view.info.state for view in await mesh.client.workers()}
            if views.get(worker.host.worker_id) is WorkerState.DRAINING:
                return
            await asyncio.sleep(0.02)


async def router_knows(mesh: Mesh, worker: PrefillService, holder_id: str, tokens: list[int]) -> None:
    """Returns when the router gives requests to `worker`, and knows that `holder_id` has the beginning of a prompt."""
    hashes = block_hashes(tokens, SIZE, root_hash())
    async with asyncio.timeout(10):
        while True:
            states = {view.info.worker_id: view.info.state for view in await mesh.client.workers()}
            holders = mesh.service._registry.cached_prefixes({SIZE: hashes})[SIZE]
            if states.get(worker.host.worker_id) is WorkerState.READY and holder_id in holders:
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("role", "tier", "kv_cache_dtype"),
    [(role, tier, "auto") for role in ("prefill", "decode") for tier in ("host", "disk")]
    + [("prefill", "disk", "int8")],
)
async def test_an_evicted_prefix_comes_back(
    tiny_model: Path, tmp_path: Path, role: str, tier: str, kv_cache_dtype: str
) -> None:
    tiers: dict[str, object] = {"kv_host_gib": 0.05}
    if tier == "disk":
        # Host memory for few blocks: most of a prompt's are on disk when it is asked for again.
        tiers = {"kv_host_gib": 0.0004, "kv_disk_gib": 0.1, "kv_disk_dir": str(tmp_path)}
    # A cache for two prompts, of which the next ones leave nothing.
    engine = {"num_blocks": 64, "max_model_len": 512, "kv_cache_dtype": kv_cache_dtype}
    prefill_tiers, decode_tiers = (tiers, {}) if role == "prefill" else ({}, tiers)
    async with Mesh(tiny_model, engine=engine, prefill_tiers=prefill_tiers, decode_tiers=decode_tiers) as mesh:
        first, none_cached = await ask(mesh, prompt(1))
        assert none_cached == 0
        for seed in range(2, 8):
            await ask(mesh, prompt(seed))
        worker = (mesh.prefills if role == "prefill" else mesh.decodes)[0]
        held = worker.host.tiers
        assert held is not None
        assert held.stats()["host"].num_stored > 100
        if tier == "disk":
            await eventually(lambda: held.stats()["disk"].num_blocks > 100)
        tokens, num_cached = await ask(mesh, prompt(1))
        assert tokens == first
        assert num_cached == (400 - 1) // SIZE * SIZE
        assert held.stats()[tier].num_hits > 0, "nothing came from the tier: the test tested nothing"
        assert held.stats()[tier].num_corrupt == 0
        await mesh.assert_idle()


async def test_a_second_worker_fetches_from_the_first_one(tiny_model: Path) -> None:
    async with Mesh(tiny_model, num_prefill=1) as mesh:
        first = mesh.prefills[0]
        tokens, _ = await ask(mesh, prompt(1)[:-5])
        second = await mesh.add_prefill()
        await leave(mesh, first)
        # It goes on differently: what only the decode worker's cache lacks would be computed there.
        longer = prompt(1)[:-5] + prompt(9, 200)
        await router_knows(mesh, second, first.host.worker_id, longer)
        expected, _ = await ask(mesh, longer)
        report = second.host.journal.report()
        received = [total for total in report.totals if total.direction.value == "receiving"]
        assert sum(total.num_done for total in received) == 1, report
        assert len(tokens) == len(expected) == 8
        await mesh.assert_idle()


async def test_a_store_gives_one_worker_what_another_computed(tiny_model: Path) -> None:
    async with Mesh(tiny_model, num_prefill=1) as mesh, store(mesh) as shared:
        first = mesh.prefills[0]
        expected, _ = await ask(mesh, prompt(1))
        await eventually(lambda: shared.info.load.num_blocks - shared.info.load.num_free_blocks == 400 // SIZE)
        await first.drain()
        await first.close()
        mesh.prefills.clear()
        second = await mesh.add_prefill()
        # The decode worker holds the prompt too: it must be asked for a prompt that shares only the beginning.
        longer = prompt(1) + prompt(9, 200)
        await router_knows(mesh, second, shared.info.worker_id, longer)
        await ask(mesh, longer)
        report = second.host.journal.report()
        assert sum(total.num_done for total in report.totals if total.direction.value == "receiving") == 1, report
        tokens, _ = await ask(mesh, prompt(1))
        assert tokens == expected
        await mesh.assert_idle()


async def test_a_store_serves_after_a_restart_what_it_kept(tiny_model: Path, tmp_path: Path) -> None:
    tiers = {"kv_disk_gib": 0.1, "kv_disk_dir": str(tmp_path / "store")}
    async with Mesh(tiny_model) as mesh:
        async with store(mesh, **tiers) as shared:
            await ask(mesh, prompt(1))
            await eventually(lambda: shared.info.load.num_blocks - shared.info.load.num_free_blocks == 400 // SIZE)
        async with store(mesh, **tiers) as shared:
            held = shared.blocks.tiers
            assert held is not None
            assert held.stats()["disk"].num_blocks == 400 // SIZE
            assert shared.info.facts == mesh.prefills[0].host.engine.facts
        await mesh.assert_idle()
