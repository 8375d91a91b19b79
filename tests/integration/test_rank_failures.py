"""A rank that is lost, hangs or fails ends what waits for it: with the reason, at once, and in every process."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from bench.engine.random_llama import llama_config, write_random_llama
from engine.api import EngineRequest
from engine.assembly import Assembly, assemble
from engine.core import EngineCore
from engine.loader import ALONE, LoadedModel, Split, fill_all, load_model
from engine.local_engine import LocalEngine
from engine.model_config import ModelConfig
from engine.parallel.exchange import GroupDownError
from engine.parallel.spawn import spawned_group
from engine.request import Request
from engine.weights.quantized import UNQUANTIZED, Quantization
from pdmesh.errors import ConfigError, MeshError
from pdmesh.sampling import SamplingParams
from tests.rank_groups import alone, arrivals, assert_same, config, group_of_ranks, serve
from tests.tiny_llamas import make_tiny_llama
from tests.tiny_models import make_tiny_model

# Over shared memory, and by torch.distributed.
KERNELS = ["auto", "torch"]
FAILURE = "not enough memory for 1 GiB"
LONG = EngineRequest("long", tuple(range(150)), SamplingParams(temperature=0.0, max_tokens=80))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that is there, and does nothing; killed in the end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.005)


class Stepping(threading.Thread):
    """Steps an engine until that raises."""

    def __init__(self, core: EngineCore, request: Request) -> None:
        super().__init__(daemon=True)
        self._core = core
        self._request = request
        self.num_steps = 0
        self.error: Exception | None = None

    def run(self) -> None:
        self._core.scheduler.add(self._request)
        try:
            while True:
                self._core.step()
                self.num_steps += 1
        except Exception as error:
            self.error = error

    def waits_in_a_step(self) -> None:
        """Returns when no step has ended for a while."""
        before = -1
        while before != self.num_steps:
            before = self.num_steps
            time.sleep(0.3)
        assert self.error is None


def begun(assembly: Assembly) -> Stepping:
    stepping = Stepping(assembly.core, Request(LONG))
    stepping.start()
    wait_until(lambda: stepping.num_steps > 3, within_s=20.0)
    return stepping


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_group_that_is_given_up_ends_the_step_that_waits(tiny_model: Path, kernels: str, tp: int, pp: int) -> None:
    of = config(tiny_model, kernels=kernels)
    with spawned_group(of, tp=tp, pp=pp) as group:
        assembly = assemble(of, load_model, lambda done, total: None, group=group)
        stepping = begun(assembly)
        with stopped(assembly.ranks[1].pid):
            stepping.waits_in_a_step()
            group.give_up("rank 1 was lost")
            stepping.join(0.2)
            assert isinstance(stepping.error, GroupDownError)
            assert stepping.error.message == "rank 1 was lost"
            assert stepping.error.reason == "RANK_LOST"


@pytest.mark.slow
def test_a_long_step_that_is_given_up_is_not_computed_to_its_end(tmp_path: Path) -> None:
    model = llama_config(
        "deep", vocab_size=512, hidden_size=512, intermediate_size=2048, num_layers=24, num_heads=8, num_kv_heads=4
    )
    of = config(write_random_llama(model, "bfloat16", tmp_path, torch.device("cpu")), num_blocks=100)

    def request() -> Request:
        draw = torch.randint(512, (230,)).tolist()
        return Request(EngineRequest("r", tuple(draw), SamplingParams(max_tokens=1)))

    with spawned_group(of, tp=2) as group:
        assembly = assemble(of, load_model, lambda done, total: None, group=group)
        durations_s = []
        for _ in range(2):
            assembly.core.scheduler.add(request())
            start = time.monotonic()
            assembly.core.step()
            durations_s.append(time.monotonic() - start)
        with stopped(assembly.ranks[1].pid):
            stepping = Stepping(assembly.core, request())
            stepping.start()
            stepping.waits_in_a_step()
            start = time.monotonic()
            group.give_up("rank 1 was lost")
            stepping.join()
            assert time.monotonic() - start < min(durations_s) / 5
            assert isinstance(stepping.error, GroupDownError)


def test_gloo_notices_by_itself_that_a_rank_died(tiny_model: Path) -> None:
    with group_of_ranks(config(tiny_model, kernels="torch"), tp=2) as assembly:
        stepping = begun(assembly)
        os.kill(assembly.ranks[1].pid, signal.SIGKILL)
        stepping.join(5.0)
        assert isinstance(stepping.error, GroupDownError)


def test_requests_fail_at_once_when_a_rank_is_lost(tiny_model: Path) -> None:
    of = config(tiny_model)

    async def run() -> None:
        with spawned_group(of, tp=2) as group:
            engine = LocalEngine(of, group=group)
            await engine.start(lambda done, total: None)
            requests = [replace(LONG, request_id=name) for name in "abcdefgh"]
            # Some of them run, some queue.
            answers = [asyncio.create_task(_read(engine, request)) for request in requests]
            while not engine.status().num_steps > 3:
                await asyncio.sleep(0.005)
            with stopped(engine.ranks[1].pid):
                await asyncio.sleep(0.3)
                engine.give_up("rank 1 was killed")
                start = time.monotonic()
                errors = await asyncio.gather(*answers, return_exceptions=True)
                ended_by = await engine.wait_ended()
                assert time.monotonic() - start < 0.1
                for error in (*errors, ended_by):
                    assert isinstance(error, MeshError)
                    assert (error.reason, error.message) == ("RANK_LOST", "rank 1 was killed")
                await engine.close()
                assert time.monotonic() - start < 1.0
                with pytest.raises(GroupDownError, match="rank 1 was killed"):
                    engine.generate(LONG)

    asyncio.run(run())


def test_an_engine_that_is_given_up_while_it_starts(tiny_model: Path) -> None:
    of = config(tiny_model)

    async def run() -> None:
        with spawned_group(of, tp=2) as group:
            [follower] = psutil.Process().children()
            with stopped(follower.pid):
                engine = LocalEngine(of, group=group)
                starting = asyncio.create_task(engine.start(lambda done, total: None))
                await asyncio.sleep(1.0)
                assert not starting.done()
                start = time.monotonic()
                engine.give_up("rank 1 was killed")
                with pytest.raises(GroupDownError, match="rank 1 was killed"):
                    await starting
                await engine.close()
                assert time.monotonic() - start < 1.0

    asyncio.run(run())


async def _read(engine: LocalEngine, request: EngineRequest) -> None:
    async with aclosing(engine.generate(request)) as outputs:
        async for _ in outputs:
            pass


class Failing:
    """Loads a model whose tenth step fails, as it would for want of memory."""

    def __init__(self) -> None:
        self._num_steps = 0

    def __call__(
        self,
        source: str,
        dtype: str,
        device: torch.device,
        on_progress: Callable[[int, int], None],
        split: Split = ALONE,
        keeps_stored: Callable[[ModelConfig], bool] = fill_all,
        quantization: Quantization = UNQUANTIZED,
    ) -> LoadedModel:
        loaded = load_model(source, dtype, device, on_progress, split, keeps_stored, quantization)
        *_, last = (module for module in loaded.model.modules() if type(module).__name__ == "MLP")
        last.register_forward_pre_hook(self._fail)
        return loaded

    def _fail(self, module: torch.nn.Module, inputs: object) -> None:
        self._num_steps += 1
        if self._num_steps == 10:
            raise torch.OutOfMemoryError(FAILURE)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_that_fails_at_the_leader_ends_the_group(tmp_path: Path, kernels: str) -> None:
    # Heads of 24 that plain torch computes, also over shared memory.
    of = config(make_tiny_llama(tmp_path, "wide-heads"), kernels=kernels)

    async def run() -> None:
        with spawned_group(of, tp=2) as group:
            engine = LocalEngine(of, Failing(), group=group)
            await engine.start(lambda done, total: None)
            with pytest.raises(GroupDownError, match=FAILURE):
                await _read(engine, LONG)
            pid = engine.ranks[1].pid
            # Not for the leader's end, but for the failed step's.
            await asyncio.to_thread(wait_until, lambda: has_ended(pid), 3.0)
            await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("kernels", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
def test_sampling_that_fails_between_two_calls_for_logits_leaves_the_ranks_together(
    tiny_model: Path, kernels: str
) -> None:
    of = config(tiny_model, kernels=kernels)
    expected = alone(config(tiny_model, kernels="torch", num_blocks=200), arrivals())
    # Two calls judge its prompt, and one is for sampling; a number of alternatives that admission would refuse.
    broken = EngineRequest("broken", tuple(range(128)), SamplingParams(max_tokens=1, prompt_logprobs=-1))
    with group_of_ranks(of, tp=2, pp=2) as assembly:
        assembly.core.scheduler.add(Request(broken))
        [output] = assembly.core.step()
        assert isinstance(output.event, MeshError)
        assert not isinstance(output.event, GroupDownError)
        answers, _ = serve(assembly.core, arrivals())
    assert_same(answers, expected)


# Leads a group that is never idle; prints its follower's process id.
LEADER = """
import sys
from pathlib import Path
from tests.rank_groups import arrivals, config, group_of_ranks, serve

with group_of_ranks(config(Path(sys.argv[1])), tp=2) as assembly:
    print(assembly.ranks[1].pid, flush=True)
    while True:
        serve(assembly.core, arrivals())
"""


def test_followers_do_not_outlive_a_leader_that_is_killed(tiny_model: Path) -> None:
    command = [sys.executable, "-c", LEADER, str(tiny_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as leader:
        assert leader.stdout is not None
        follower = int(leader.stdout.readline())
        assert not has_ended(follower)
        # In the middle of a step, where the follower waits for no message.
        time.sleep(0.2)
        leader.kill()
    wait_until(lambda: has_ended(follower), within_s=2.0)


def test_a_follower_that_cannot_load_its_part(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    of = config(tiny_model)
    with (
        spawned_group(replace(of, model="/nowhere"), tp=2) as group,
        pytest.raises(GroupDownError, match="rank 1 ended before its part of the model was loaded: see its log"),
    ):
        assemble(of, load_model, lambda done, total: None, group=group)
    assert "/nowhere" in capfd.readouterr().err


def test_a_follower_with_other_weights(tiny_model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path, "gqa", seed=1)
    with (
        spawned_group(config(other), tp=2) as group,
        pytest.raises(ConfigError, match="rank 1 has another model under this name: give all nodes the same files"),
    ):
        assemble(config(tiny_model), load_model, lambda done, total: None, group=group)


def test_a_follower_that_computes_in_another_way(tiny_model: Path) -> None:
    with (
        spawned_group(config(tiny_model, kernels="torch"), tp=2) as group,
        pytest.raises(ConfigError, match="rank 1 and rank 0 differ in whether they have the CPU kernels"),
    ):
        assemble(config(tiny_model), load_model, lambda done, total: None, group=group)


def test_a_leader_that_cannot_load_lets_its_followers_go(tiny_model: Path) -> None:
    start = time.monotonic()
    with spawned_group(config(tiny_model), tp=2) as group, pytest.raises(ConfigError, match="/nowhere"):
        assemble(config(Path("/nowhere")), load_model, lambda done, total: None, group=group)
    # They have begun to load meanwhile, and are not waited for until they are killed.
    assert time.monotonic() - start < 15.0


def test_a_model_that_cannot_be_split_so_says_how_it_can(tiny_model: Path) -> None:
    with (
        spawned_group(config(tiny_model), tp=3) as group,
        pytest.raises(ConfigError, match=r"--tp is 3: 4 heads over 2 KV heads .* use 1, 2 or 4"),
    ):
        assemble(config(tiny_model), load_model, lambda done, total: None, group=group)
