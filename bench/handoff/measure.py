"""A mesh for each transport, its workers on a core each, and rounds in which both ways take turns."""

import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from bench.handoff.clients import PrefillClient, answer, idle
from bench.handoff.figures import Answer, Round
from bench.handoff.pinning import pin
from bench.load import Workload
from pdmesh import AsyncClient
from pdmesh.channels import ChannelPool
from pdmesh.local.cluster import LocalCluster
from pdmesh.local.config import LocalConfig
from pdmesh.types import Role, WorkerInfo


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured.

    Attributes:
        model: Model directory or .gguf file.
        dtype: What it computes in.
        kv_cache_bytes: Of each worker. What has never been written costs more the first time: rounds before those that
            count write all of it.
        prefill_core, decode_core: Each worker's, and no other's.
        rounds: A prompt for each way in each.
    """

    model: str
    dtype: str
    prompt_tokens: int
    output_tokens: int
    rounds: int
    kv_cache_bytes: int
    prefill_core: int
    decode_core: int


async def measure(setting: Setting, transport: str, say: Callable[[str], None]) -> list[Round]:
    """All rounds over one transport, in a mesh started for them.

    Args:
        say: Told in one line of what goes on.

    Raises ConfigError where the mesh does not start, RuntimeError where it does something else than was to be measured.
    """
    config = LocalConfig(
        model=setting.model,
        port=0,
        dtype=setting.dtype,
        num_threads=1,
        kv_cache_bytes=setting.kv_cache_bytes,
        transports=transport,
        log_level="warning",
    )
    cluster = LocalCluster(config, say)
    try:
        say(f"{transport}: starting the mesh")
        for worker in await cluster.start(lambda workers: None):
            assert worker.pid is not None
            assert worker.info is not None
            pin(worker.pid, setting.prefill_core if worker.info.role is Role.PREFILL else setting.decode_core)
        return await _rounds(setting, transport, cluster.address, say)
    finally:
        await cluster.stop()
        cluster.remove_logs()


async def _rounds(setting: Setting, transport: str, address: str, say: Callable[[str], None]) -> list[Round]:
    channels = ChannelPool()
    async with AsyncClient(address) as client, aclosing(channels):
        workers = [view.info for view in await client.workers()]
        (prefill,) = (worker for worker in workers if worker.role is Role.PREFILL)
        assert prefill.model is not None
        alone = PrefillClient(prefill, channels)
        workload = Workload(setting.prompt_tokens, setting.output_tokens, prefill.model.vocab_size)
        draw = random.Random(0)

        async def ask_alone(prompt: Sequence[int]) -> float:
            await idle(workers, channels)
            return await alone.first_token_s(prompt)

        async def ask_mesh(prompt: Sequence[int]) -> Answer:
            await idle(workers, channels)
            return await answer(client, prompt, setting.output_tokens, transport)

        num_warm_up = _warm_up_rounds(workers, setting.prompt_tokens)
        rounds = []
        for number in range(num_warm_up + setting.rounds):
            say(f"{transport}: round {number + 1} of {num_warm_up} to warm up and {setting.rounds} that count")
            # Who goes first changes: a machine that slows down does so for both.
            if number % 2:
                mesh_answer = await ask_mesh(workload.prompt(draw))
                alone_s = await ask_alone(workload.prompt(draw))
            else:
                alone_s = await ask_alone(workload.prompt(draw))
                mesh_answer = await ask_mesh(workload.prompt(draw))
            rounds.append(Round(alone_s, mesh_answer))
    return rounds[num_warm_up:]


def _warm_up_rounds(workers: Sequence[WorkerInfo], prompt_tokens: int) -> int:
    """After so many prompts, each with blocks of its own, every block of every worker was written."""
    numbers = []
    for worker in workers:
        assert worker.facts is not None
        numbers.append(worker.load.num_blocks * worker.facts.block_size // prompt_tokens + 1)
    return max(numbers)
