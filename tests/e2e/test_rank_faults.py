"""A rank dies, stands still or gets no memory: its group is down at once, says why, and serves again by itself.

Nobody waits for it: a stream goes on at another worker with the same tokens, or fails with the reason.
"""

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from pdmesh.errors import RANK_LOST, MeshError, UnavailableError
from pdmesh.generation import GenerationResult
from pdmesh.local.child import ChildProcess
from pdmesh.sampling import SamplingParams
from tests.group_faults import Fault, RunningGroup
from tests.processes import ProcessMesh
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

log = logging.getLogger(__name__)

# From the fault to the end of every rank. Want of memory shows at the next allocation, and takes a while to.
DOWN_S = {Fault.KILL: 2.0, Fault.STOP: 3.0, Fault.NO_MEMORY: 5.0}
# In which a client hears of it.
TOLD_S = {Fault.KILL: 2.0, Fault.STOP: 3.0, Fault.NO_MEMORY: 5.0}
START_S = 40.0
NUM_STREAMS = 4


@dataclass(frozen=True)
class Requests:
    """Streams that last long enough to be struck, and what each is answered when nothing goes wrong."""

    mesh: ProcessMesh
    prompts: Sequence[Sequence[int]]
    answers: Sequence[tuple[int, ...]]

    @classmethod
    async def learn(cls, mesh: ProcessMesh) -> "Requests":
        draw = random.Random(3)
        prompts = [[draw.randrange(VOCAB_SIZE - 64) for _ in range(200)] for _ in range(NUM_STREAMS)]
        requests = cls(mesh, prompts, ())
        return cls(mesh, prompts, [(await requests.ask(number)).token_ids for number in range(NUM_STREAMS)])

    async def ask(self, number: int) -> GenerationResult:
        """Number is even: greedy; odd: seeded. Its prompt is cached nowhere."""
        sampling = SamplingParams(temperature=0.9 * (number % 2), seed=number, max_tokens=500, ignore_eos=True)
        tokens, salt = self.prompts[number], random.randbytes(8).hex()
        return await self.mesh.client.generate(tokens=tokens, sampling=sampling, cache_salt=salt, timeout_s=60)

    async def started(self) -> list["asyncio.Task[GenerationResult]"]:
        """All of them, under way at the same time: begun anew where, one ended before another ran."""
        async with asyncio.timeout(60):
            while True:
                streams = [asyncio.create_task(self.ask(number)) for number in range(NUM_STREAMS)]
                while not any(stream.done() for stream in streams):
                    busy = [(await self.mesh.status(worker.name)).num_requests for worker in self.mesh.decodes]
                    if sum(busy) == NUM_STREAMS:
                        return streams
                    await asyncio.sleep(0.01)
                await asyncio.gather(*streams)

    async def check(self) -> None:
        results = await asyncio.gather(*(self.ask(number) for number in range(NUM_STREAMS)))
        assert [result.token_ids for result in results] == self.answers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("many_heads"), "many_heads")


def _mesh(model: Path, run_dir: Path, role: str, fault: Fault, num_workers: int = 1) -> ProcessMesh:
    """One whose workers of a role are groups. For want of memory nothing fails that was allocated at the start: on
    plain torch each step allocates, the longer the prompt the more."""
    kernels = ("--kernels", "torch") if fault is Fault.NO_MEMORY else ()
    local = ("--short-prefill-tokens", "2000") if fault is Fault.NO_MEMORY and role == "decode" else ()
    group = ("--tp", "2", *kernels)
    if role == "decode":
        return ProcessMesh(model, run_dir, num_decode=num_workers, decode_flags=group, router_flags=local)
    return ProcessMesh(model, run_dir, num_prefill=num_workers, prefill_flags=group)


def _workers(mesh: ProcessMesh, role: str) -> list[ChildProcess]:
    return mesh.decodes if role == "decode" else mesh.prefills


def _reason(group: RunningGroup, rank: int, fault: Fault) -> str:
    """What the client is told. For want of memory a rank ends as it comes, and another may notice it first."""
    name = f"rank {rank} (pid {group.pids[rank]})"
    said = {Fault.KILL: f"{name} was ended by SIGKILL", Fault.STOP: f"{name} was stopped by a signal"}
    return said.get(fault, "rank")


async def _hungry(mesh: ProcessMesh) -> None:
    """Makes ranks allocate: prompts far longer than any before."""
    tokens = list(range(240)) * 4
    sampling = SamplingParams(max_tokens=8, ignore_eos=True, prompt_logprobs=1)
    asks = [
        mesh.client.generate(tokens=tokens[n:], sampling=sampling, cache_salt=str(n), timeout_s=30) for n in range(8)
    ]
    for result in await asyncio.gather(*asks, return_exceptions=True):
        assert isinstance(result, GenerationResult | MeshError), result


Case = tuple[str, int, Fault]


def _table(*quick: Case) -> list[ParameterSet]:
    """All cases; all but those that are `quick` are slow.

    Without the leader's want of memory: what it asks the system for, and when, is gRPC's affair as much as ours.
    """
    cases = [
        (role, rank, fault)
        for role in ("decode", "prefill")
        for rank in (0, 1)
        for fault in Fault
        if (rank, fault) != (0, Fault.NO_MEMORY)
    ]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("role", "rank", "fault"), _table(("decode", 1, Fault.KILL)))
async def test_the_only_group_of_its_role(model: Path, tmp_path: Path, role: str, rank: int, fault: Fault) -> None:
    async with _mesh(model, tmp_path, role, fault) as mesh:
        requests = await Requests.learn(mesh)
        group = await RunningGroup.of(mesh, _workers(mesh, role)[0])
        streams = await requests.started()
        struck_at = time.monotonic()
        group.strike(rank, fault)
        hungry = asyncio.create_task(_hungry(mesh)) if fault is Fault.NO_MEMORY or role == "prefill" else None
        down_s = await group.down(struck_at, DOWN_S[fault])
        results = await asyncio.gather(*streams, return_exceptions=True)
        if hungry is not None:
            await hungry
        told_s = time.monotonic() - struck_at
        again_s = await group.serving_again(mesh, struck_at, START_S)
        log.info(
            "%s, rank %d, %s: down after %.2f s, clients told after %.2f s, serving again after %.2f s",
            role, rank, fault.value, down_s, told_s, again_s,
        )  # fmt: skip
        if role == "prefill":
            # The decode worker computes prompts itself.
            assert [result.token_ids for result in results if isinstance(result, GenerationResult)] == requests.answers
        else:
            assert told_s < TOLD_S[fault]
            for result in results:
                assert isinstance(result, UnavailableError), result
                if rank:
                    assert result.reason == RANK_LOST
                    assert _reason(group, rank, fault) in result.message
        assert _reason(group, rank, fault) in group.log
        await mesh.assert_idle()
        await requests.check()
        await mesh.assert_idle()


@pytest.mark.parametrize(("role", "rank", "fault"), _table())
async def test_another_group_goes_on(model: Path, tmp_path: Path, role: str, rank: int, fault: Fault) -> None:
    async with _mesh(model, tmp_path, role, fault, num_workers=2) as mesh:
        requests = await Requests.learn(mesh)
        group = await RunningGroup.of(mesh, _workers(mesh, role)[0])
        streams = await requests.started()
        struck_at = time.monotonic()
        group.strike(rank, fault)
        hungry = asyncio.create_task(_hungry(mesh)) if fault is Fault.NO_MEMORY or role == "prefill" else None
        await group.down(struck_at, DOWN_S[fault])
        results = await asyncio.gather(*streams)
        assert [result.token_ids for result in results] == requests.answers
        if role == "decode":
            assert sum(result.report.decode_resumes for result in results) > 0, "none was there"
        if hungry is not None:
            await hungry
        await group.serving_again(mesh, struck_at, START_S)
        await requests.check()
        await mesh.assert_idle()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", [Fault.KILL, Fault.STOP])
async def test_a_group_that_is_idle(model: Path, tmp_path: Path, rank: int, fault: Fault) -> None:
    async with _mesh(model, tmp_path, "decode", fault) as mesh:
        requests = await Requests.learn(mesh)
        for _ in range(2):
            group = await RunningGroup.of(mesh, mesh.decodes[0])
            struck_at = time.monotonic()
            group.strike(rank, fault)
            await group.down(struck_at, DOWN_S[fault])
            await group.serving_again(mesh, struck_at, START_S)
        await requests.check()
        await mesh.assert_idle()


@pytest.mark.slow
async def test_a_supervisor_that_is_killed_takes_its_ranks_with_it(model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(model, tmp_path, decode_flags=("--tp", "2")) as mesh:
        requests = await Requests.learn(mesh)
        (decode,) = mesh.decodes
        group = await RunningGroup.of(mesh, decode)
        streams = await requests.started()
        struck_at = time.monotonic()
        assert decode.pid is not None
        os.kill(decode.pid, signal.SIGKILL)
        await group.down(struck_at, DOWN_S[Fault.KILL])
        for result in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(result, UnavailableError), result
        assert time.monotonic() - struck_at < TOLD_S[Fault.KILL]
        await decode.wait()
        await mesh.assert_idle()


async def test_a_supervisor_that_is_told_to_end_drains(model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(model, tmp_path, decode_flags=("--tp", "2")) as mesh:
        requests = await Requests.learn(mesh)
        (decode,) = mesh.decodes
        group = await RunningGroup.of(mesh, decode)
        streams = await requests.started()
        assert decode.pid is not None
        os.kill(decode.pid, signal.SIGTERM)
        assert [result.token_ids for result in await asyncio.gather(*streams)] == requests.answers
        async with asyncio.timeout(10):
            assert await decode.wait() == 0
        assert group.is_down
        assert "starting all ranks again" not in group.log


@pytest.mark.slow
async def test_redis_is_down_while_a_rank_dies(model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(model, tmp_path, num_decode=2, decode_flags=("--tp", "2")) as mesh:
        requests = await Requests.learn(mesh)
        group = await RunningGroup.of(mesh, mesh.decodes[0])
        streams = await requests.started()
        mesh.valkey.kill()
        struck_at = time.monotonic()
        group.strike(1, Fault.KILL)
        await group.down(struck_at, DOWN_S[Fault.KILL])
        results = await asyncio.gather(*streams)
        assert [result.token_ids for result in results] == requests.answers
        assert sum(result.report.decode_resumes for result in results) > 0, "none was there"
        mesh.valkey.restart_empty()
        await group.serving_again(mesh, struck_at, START_S)
        await mesh.until(mesh.all_ready, "every worker in the directory again", 10)
        await requests.check()
        await mesh.assert_idle()


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("nothing-here", ("--tp", "2"), "no such file or directory: name a model directory"),
        pytest.param(
            "",
            ("--tp", "7"),
            "--tp is 7: 12 heads over 6 KV heads cannot be shared fairly among so many ranks; use 1, 2, 3,",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "",
            ("--pp", "4"),
            "--pp is 4 and the model has 3 layers: use at most as many stages",
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_what_a_person_must_mend_is_said_once(
    model: Path, tmp_path: Path, name: str, flags: Sequence[str], line: str
) -> None:
    mesh = ProcessMesh(model / name, tmp_path, decode_flags=flags)
    (decode,) = mesh.decodes
    with mesh.valkey:
        await decode.start()
        async with asyncio.timeout(START_S):
            assert await decode.wait() == 2
    text = [said for said in decode.log_path.read_text().splitlines() if not said.startswith("{")]
    assert len(text) == 1, text
    assert line in text[0]
