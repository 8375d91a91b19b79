"""A group of ranks over two machines: its KV travels straight to and from both, and it ends where they lose each other.

The machines are network namespaces (tests/hosts.py); router, Redis and the workers of one machine run beside them.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from pdmesh.generation import GenerationResult
from pdmesh.local.child import ChildProcess
from pdmesh.sampling import SamplingParams
from pdmesh.transfers import Direction
from tests.hosts import TwoHosts, two_hosts, why_no_hosts
from tests.processes import ProcessMesh
from tests.rank_groups import Arrival, alone, config
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.e2e

# K and V of three layers, two KV heads, 16 tokens and 16 dimensions, in float32.
BLOCK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
GROUP = "group"
# From the cut of a link to the end of the leader: silence is noticed after 1.25 s, and its process has 0.7 s left.
DOWN_S = 2.0


@pytest.fixture
def net() -> Iterator[TwoHosts]:
    if reason := why_no_hosts():
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


def mesh_around(net: TwoHosts, model: Path, run_dir: Path, *, num_prefill: int = 1, num_decode: int = 0) -> ProcessMesh:
    """Workers of one machine that both hosts reach; groups are to be added."""
    listen = ("--host", "0.0.0.0", "--advertise", net.hosts[0].test_address)
    return ProcessMesh(
        model, run_dir, num_prefill=num_prefill, num_decode=num_decode, flags=listen,
        decode_flags=("--short-prefill-tokens", "8"),
    )  # fmt: skip


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    draw = random.Random(sum(lengths))
    return [tuple(draw.randrange(VOCAB_SIZE - 64) for _ in range(length)) for length in lengths]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def of_one_rank(model: Path, asked: Sequence[tuple[int, ...]], num_tokens: int) -> list[tuple[int, ...]]:
    """The tokens that one rank gives to each prompt by itself."""
    arriving = [Arrival(0, prompt, greedy(num_tokens)) for prompt in asked]
    answers = alone(config(model, num_blocks=200, max_model_len=1000), arriving)
    return [tuple(answer.token_ids) for answer in answers]


async def answers(mesh: ProcessMesh, asked: Sequence[tuple[int, ...]], num_tokens: int) -> list[GenerationResult]:
    """To all prompts at once; each with a salt of its own, so that its KV is nobody's yet."""
    return await asyncio.gather(
        *(
            mesh.client.generate(
                tokens=prompt, sampling=greedy(num_tokens), cache_salt=str(random.random()), timeout_s=60
            )
            for prompt in asked
        )
    )


def num_kv_bytes(prompt: Sequence[int]) -> int:
    return -(-len(prompt) // 16) * BLOCK_BYTES


async def num_moved(mesh: ProcessMesh, worker_id: str, direction: Direction) -> int:
    """Bytes that a worker's journal says were moved; of a group, the leader's journal."""
    (said,) = [worker for worker in await mesh.client.transfers() if worker.worker_id == worker_id]
    assert said.report is not None, said.error
    return sum(total.num_bytes for total in said.report.totals if total.direction is direction)


async def assert_serves(
    mesh: ProcessMesh, asked: Sequence[tuple[int, ...]], expected: Sequence[tuple[int, ...]]
) -> None:
    """As one rank would, with every byte of the KV brought once."""
    for prompt, tokens, answer in zip(asked, expected, await answers(mesh, asked, len(expected[0])), strict=True):
        assert answer.token_ids == tokens
        assert (answer.report.prefill_retries, answer.report.decode_resumes) == (0, 0)
        assert answer.report.kv_transport == "tcp"
        assert answer.report.kv_bytes == num_kv_bytes(prompt)
    await mesh.assert_idle()


async def test_kv_comes_straight_to_both_nodes(net: TwoHosts, tiny_model: Path, tmp_path: Path) -> None:
    mesh = mesh_around(net, tiny_model, tmp_path)
    mesh.add_group(GROUP, "decode", net.hosts, "--tp", "2")
    asked = prompts(70, 100, 250)
    expected = of_one_rank(tiny_model, asked, 20)
    async with mesh:
        await assert_serves(mesh, asked, expected)
        num_bytes = sum(map(num_kv_bytes, asked))
        # Half of each block is the leader's; what went to the other node never was there.
        assert await num_moved(mesh, "prefill-0", Direction.SENDING) == num_bytes
        assert await num_moved(mesh, GROUP, Direction.RECEIVING) == num_bytes // 2


@pytest.mark.slow
async def test_prefill_in_stages_over_both_hosts(net: TwoHosts, tiny_model: Path, tmp_path: Path) -> None:
    """Each stage's layers come from the host that has them."""
    mesh = mesh_around(net, tiny_model, tmp_path, num_prefill=0, num_decode=1)
    mesh.add_group(GROUP, "prefill", net.hosts, "--pp", "2")
    asked = prompts(70, 100, 250)
    expected = of_one_rank(tiny_model, asked, 20)
    async with mesh:
        await assert_serves(mesh, asked, expected)
        num_bytes = sum(map(num_kv_bytes, asked))
        assert await num_moved(mesh, "decode-0", Direction.RECEIVING) == num_bytes
        # One of three layers is the first stage's.
        assert await num_moved(mesh, GROUP, Direction.SENDING) == num_bytes // 3


@pytest.mark.slow
async def test_from_two_hosts_to_two_hosts(net: TwoHosts, tiny_model: Path, tmp_path: Path) -> None:
    mesh = mesh_around(net, tiny_model, tmp_path, num_prefill=0)
    mesh.add_group(GROUP, "decode", net.hosts, "--tp", "2")
    mesh.add_group("sends", "prefill", net.hosts, "--tp", "2")
    asked = prompts(70, 100, 250)
    expected = of_one_rank(tiny_model, asked, 20)
    async with mesh:
        for prompt, tokens, answer in zip(asked, expected, await answers(mesh, asked, 20), strict=True):
            assert answer.token_ids == tokens
            assert answer.report.prefill_worker_id == "sends"
            assert answer.report.kv_bytes == num_kv_bytes(prompt)
        await mesh.assert_idle()
        # Leader to leader, and the other half beside it, from node to node.
        half = sum(map(num_kv_bytes, asked)) // 2
        assert await num_moved(mesh, "sends", Direction.SENDING) == half
        assert await num_moved(mesh, GROUP, Direction.RECEIVING) == half


@pytest.mark.slow
@pytest.mark.parametrize("fault", [TwoHosts.cut, TwoHosts.swallow], ids=["the link is down", "the link is silent"])
async def test_hosts_that_lose_each_other_end_the_group_until_they_meet_again(
    net: TwoHosts, tiny_model: Path, tmp_path: Path, fault: Callable[[TwoHosts], None]
) -> None:
    mesh = mesh_around(net, tiny_model, tmp_path, num_decode=1)
    nodes = mesh.add_group(GROUP, "decode", net.hosts, "--tp", "2")
    asked = prompts(*range(70, 190, 15))
    num_tokens = 700
    expected = of_one_rank(tiny_model, asked, num_tokens)
    async with mesh:
        before = (await mesh.workers())[GROUP].info.incarnation
        ranks = [ranks_of(node) for node in nodes]
        assert [len(of_node) for of_node in ranks] == [1, 1]
        asking = asyncio.create_task(answers(mesh, asked, num_tokens))

        async def at_work() -> bool:
            return (await mesh.status(GROUP)).num_requests >= 3

        await mesh.until(at_work, "streams on the group")
        assert net.connected()
        await asyncio.to_thread(fault, net)
        begun = time.monotonic()
        await mesh.until(lambda: are_gone(ranks[0]), "the leader gone", 10)
        down_s = time.monotonic() - begun
        await mesh.until(lambda: are_gone(ranks[1]), "the follower gone", 10)
        follower_down_s = time.monotonic() - begun
        assert not net.connected()
        for answer, tokens in zip(await asking, expected, strict=True):
            assert answer.token_ids == tokens
        assert down_s < DOWN_S
        assert follower_down_s < DOWN_S
        resumed_on = [one.report.decode_worker_id for one in asking.result() if one.report.decode_resumes]
        # A stream that had no token yet when the link was cut begins anew, which is no resume.
        assert set(resumed_on) == {"decode-0"}
        assert_said(nodes[0], "node 1 (")
        assert_said(nodes[1], "node 0 is lost")
        await mesh.assert_idle()
        net.mend()

        async def back() -> bool:
            view = (await mesh.workers()).get(GROUP)
            return view is not None and view.info.incarnation != before and not view.excluded_because

        await mesh.until(back, "the group serves again", 40)
        answer_ids = {answer.report.decode_worker_id for answer in await answers(mesh, asked, 20)}
        assert GROUP in answer_ids
        await mesh.assert_idle()


def ranks_of(node: ChildProcess) -> list[psutil.Process]:
    """The processes that a node's supervisor has started."""
    assert node.pid is not None
    return psutil.Process(node.pid).children()


async def are_gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(process.is_running() for process in processes)


def assert_said(node: ChildProcess, words: str) -> None:
    """A node's supervisor has warned in these words."""
    lines = [json.loads(line) for line in node.log_path.read_text().splitlines()]
    warned = [line["message"] for line in lines if line["level"] == "warning"]
    assert any(words in message for message in warned), warned
