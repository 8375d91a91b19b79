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
from pdmesh.types import Role

# Not counted: connections are made, and caches and branch predictors find their feet.
_WARM_UP_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured.

    Attributes:
        model: Model directory or .gguf file.
        dtype: What it computes in.
        prefill_core, decode_core: Each worker's, and no other's.
        rounds: A prompt for each way in each.
    """

    model: str
    dtype: str
    prompt_tokens: int
    output_tokens: int
    rounds: int
    prefill_core: int
    decode_core: int


async def measure(setting: Setting, transport: str, say: Callable[[str], None]) -> list[Round]:
    """All rounds over one transport, in a mesh started for them.

    Args:
        say: Told in one line of what goes on.

    Raises ConfigError where the mesh does not start, RuntimeError where it does something else than was to be measured.
    """
    config = LocalConfig(
        model=setting.model, port=0, dtype=setting.dtype, num_threads=1, transports=transport, log_level="warning"
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

        rounds = []
        for number in range(_WARM_UP_ROUNDS + setting.rounds):
            say(f"{transport}: round {number - _WARM_UP_ROUNDS + 1} of {setting.rounds}")
            # Who goes first changes: a machine that slows down does so for both.
            if number % 2:
                mesh_answer = await ask_mesh(workload.prompt(draw))
                alone_s = await ask_alone(workload.prompt(draw))
            else:
                alone_s = await ask_alone(workload.prompt(draw))
                mesh_answer = await ask_mesh(workload.prompt(draw))
            rounds.append(Round(alone_s, mesh_answer))
    return rounds[_WARM_UP_ROUNDS:]
