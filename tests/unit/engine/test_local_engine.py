"""The engine behind its thread: what its streams and leases promise, at every moment at which they may be let go."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import torch

from engine.api import BlockEvents, BlockLease, EngineRequest, ImportedPrompt, OutputStream, PrefillUpdate
from engine.config import EngineConfig
from engine.loader import ALONE, LoadedModel, Split, fill_all
from engine.local_engine import LocalEngine
from engine.model_config import ModelConfig
from engine.weights.quantized import UNQUANTIZED, Quantization
from pdmesh.errors import ConfigError, InternalError, InvalidRequestError, UnavailableError
from pdmesh.hashing import block_hashes, root_hash
from pdmesh.sampling import SamplingParams
from pdmesh.types import FinishReason
from tests.fake_model import FakeLoader, fake_next, fake_output
from tests.leaks import assert_engine_idle

CONFIG = EngineConfig(
    model="fake",
    device="cpu",
    dtype="float32",
    block_size=4,
    num_blocks=32,
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_prefill_chunk=8,
)


class Gate:
    """Holds every step just before it computes, until it is let pass."""

    def __init__(self) -> None:
        self._entered = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)
        self._open = False

    def __call__(self) -> None:
        if not self._open:
            self._entered.release()
            self._passes.acquire()

    async def step_begins(self) -> None:
        await asyncio.to_thread(self._entered.acquire)

    def let_pass(self) -> None:
        self._passes.release()

    def open(self) -> None:
        self._open = True
        self._passes.release()


@contextlib.asynccontextmanager
async def running_engine(
    config: EngineConfig = CONFIG, on_forward: Callable[[], None] = lambda: None
) -> AsyncIterator[LocalEngine]:
    """A started engine, which must be idle in the end."""
    engine = LocalEngine(config, FakeLoader(on_forward))
    await engine.start(lambda done, total: None)
    try:
        yield engine
        await assert_engine_idle(engine)
    finally:
        if isinstance(on_forward, Gate):
            on_forward.open()
        await engine.close()


def ask(prompt: Sequence[int], max_tokens: int = 4) -> EngineRequest:
    return EngineRequest("r", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=max_tokens))


async def tokens_of(stream: OutputStream) -> list[int]:
    tokens: list[int] = []
    async for output in stream:
        assert output.first_token_index == len(tokens)
        tokens += output.token_ids
    assert output.finish_reason is FinishReason.LENGTH
    return tokens


async def test_many_at_once_get_the_tokens_that_each_gets_alone() -> None:
    async with running_engine() as engine:
        prompts = [range(start, start + length) for start in range(0, 60, 6) for length in (1, 9, 30)]
        outputs = await asyncio.gather(*(tokens_of(engine.generate(ask(prompt, 9))) for prompt in prompts))
        assert outputs == [fake_output(prompt, 9) for prompt in prompts]


async def test_what_it_is() -> None:
    async with running_engine() as engine:
        assert (engine.model.name, engine.model.vocab_size, engine.model.max_model_len) == ("fake", 97, 64)
        facts = engine.facts
        assert (facts.dtype, facts.block_size, facts.num_layers, facts.head_dim) == ("float32", 4, 1, 2)
        assert engine.memory.block_bytes == 2 * 4 * 2 * 4
        assert engine.status().num_blocks == engine.load().num_free_blocks == 32


async def test_a_prompt_prefilled_here_goes_on_there() -> None:
    """Prefill on one engine, decode on another, KV copied block by block between them."""
    prompt = range(5, 27)
    async with running_engine() as prefill, running_engine() as decode:
        # The decode engine has the first blocks in its cache already.
        await tokens_of(decode.generate(ask(prompt[:9])))
        updates = prefill.prefill(ask(prompt, 6))
        seen: list[PrefillUpdate] = [update async for update in updates]
        assert [update.num_computed_tokens for update in seen] == [0, 8, 16, 22]
        assert [update.output is None for update in seen] == [True, True, True, False]
        last = seen[-1]
        assert last.output is not None
        assert last.output.token_ids == (fake_next(prompt),)

        lease = await decode.acquire_prefix(prompt, b"")
        assert lease.num_cached_blocks == 2
        await decode.reserve(lease, len(last.block_ids) - 2)
        for source, target in list(zip(last.block_ids, lease.block_ids, strict=True))[2:]:
            decode.memory.view(target)[:] = prefill.memory.view(source)
        await updates.aclose()
        await assert_engine_idle(prefill)

        rest = [o async for o in decode.generate(ask(prompt, 6), ImportedPrompt(lease, last.output.token_ids[0]))]
        assert [output.first_token_index for output in rest] == [1, 2, 3, 4, 5]
        tokens = [*last.output.token_ids, *(token for output in rest for token in output.token_ids)]
        assert tokens == fake_output(prompt, 6)


async def test_the_first_prefill_update_comes_before_the_step_has_run() -> None:
    gate = Gate()
    async with running_engine(on_forward=gate) as engine:
        updates = engine.prefill(ask(range(12)))
        iterator = aiter(updates)
        first = await anext(iterator)
        assert (first.num_computed_tokens, first.block_ids, first.output) == (0, (), None)
        await gate.step_begins()
        gate.let_pass()
        assert (await anext(iterator)).num_computed_tokens == 8
        gate.open()
        await updates.aclose()


# Leaving


async def test_closing_while_the_first_step_computes_frees_by_its_end() -> None:
    gate = Gate()
    async with running_engine(on_forward=gate) as engine:
        stream = engine.generate(ask(range(12)))
        await gate.step_begins()
        assert engine.status().num_requests == 1
        await stream.aclose()
        await stream.aclose()
        gate.open()
        await assert_engine_idle(engine)
        assert engine.status().num_steps == 1
        assert [output async for output in stream] == []


async def test_closing_what_still_waits() -> None:
    gate = Gate()
    async with running_engine(on_forward=gate) as engine:
        first = engine.generate(ask(range(30), 20))
        await gate.step_begins()
        # It is in the inbox when it is closed, and never gets further.
        second = engine.generate(ask(range(30)))
        await second.aclose()
        gate.open()
        assert await tokens_of(first) == fake_output(range(30), 20)


async def test_closing_during_decode_and_prefill() -> None:
    gate = Gate()
    async with running_engine(on_forward=gate) as engine:
        stream, updates = engine.generate(ask(range(4), 30)), engine.prefill(ask(range(40, 60)))
        tokens = aiter(stream)
        for _ in range(2):
            await gate.step_begins()
            gate.let_pass()
        await anext(tokens)
        await gate.step_begins()
        await stream.aclose()
        await updates.aclose()
        gate.open()
        with pytest.raises(StopAsyncIteration):
            await anext(tokens)


async def test_closing_ends_the_wait_of_whoever_iterates() -> None:
    gate = Gate()
    async with running_engine(on_forward=gate) as engine:
        stream = engine.generate(ask(range(12)))
        reading = asyncio.create_task(_read_all(stream))
        await gate.step_begins()
        await stream.aclose()
        assert await reading == 0
        gate.open()


async def _read_all(stream: OutputStream) -> int:
    return len([output async for output in stream])


async def test_cancelling_whoever_iterates_and_closing() -> None:
    gate = Gate()
    async with running_engine(on_forward=gate) as engine:

        async def serve() -> None:
            async with contextlib.aclosing(engine.generate(ask(range(12)))) as stream:
                async for _ in stream:
                    pass

        serving = asyncio.create_task(serve())
        await gate.step_begins()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        gate.open()


async def test_held_blocks_stay_until_closed() -> None:
    async with running_engine() as engine:
        updates = engine.prefill(ask(range(12)))
        seen = [update async for update in updates]
        assert engine.status().num_requests == 1
        assert engine.status().num_free_blocks == 32 - len(seen[-1].block_ids)
        await updates.aclose()


# Leases


async def test_reserve_waits_its_turn_and_gets_what_others_give_back() -> None:
    async with running_engine() as engine:
        first, second = BlockLease(), BlockLease()
        await engine.reserve(first, 16)
        await engine.reserve(second, 10)
        third, fourth = BlockLease(), BlockLease()
        waiting = asyncio.create_task(engine.reserve(third, 12))
        await asyncio.sleep(0)
        behind = asyncio.create_task(engine.reserve(fourth, 1))
        # A full round through the engine's thread later, neither has anything.
        await engine.release(await engine.acquire_prefix([1], b""))
        assert not waiting.done()
        assert not behind.done()
        await engine.release(second)
        await waiting
        await behind
        assert (len(third.block_ids), len(fourth.block_ids)) == (12, 1)
        assert not {*first.block_ids} & {*third.block_ids}
        for lease in (first, second, third, fourth):
            await engine.release(lease)


async def test_a_cancelled_reserve_leaves_the_lease_and_the_queue_as_they_were() -> None:
    async with running_engine() as engine:
        first, second, third = BlockLease(), BlockLease(), BlockLease()
        await engine.reserve(first, 16)
        await engine.reserve(second, 10)
        waiting = asyncio.create_task(engine.reserve(third, 12))
        await asyncio.sleep(0)
        fourth = BlockLease()
        behind = asyncio.create_task(engine.reserve(fourth, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await behind
        assert third.block_ids == []
        for lease in (first, second, third, fourth):
            await engine.release(lease)


async def test_a_reserve_cancelled_when_its_grant_is_on_the_way() -> None:
    async with running_engine() as engine:
        lease = BlockLease()
        await engine.reserve(lease, 2)
        before = list(lease.block_ids)
        waiting = asyncio.create_task(engine.reserve(lease, 3))
        await asyncio.sleep(0)
        # The loop stands still until the thread has granted it; the news waits behind what follows here.
        while engine.status().num_free_blocks > 32 - 5:
            pass
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await engine.release(await engine.acquire_prefix([1], b""))
        assert lease.block_ids == before
        await engine.release(lease)


async def test_a_cancelled_acquire_leaves_no_lease() -> None:
    async with running_engine() as engine:
        await tokens_of(engine.generate(ask(range(20))))
        acquiring = asyncio.create_task(engine.acquire_prefix(range(20), b""))
        await asyncio.sleep(0)
        acquiring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await acquiring


async def test_a_lease_that_can_never_be_had_is_refused() -> None:
    async with running_engine() as engine:
        lease = BlockLease()
        with pytest.raises(InvalidRequestError, match="17 KV blocks are asked for: a request may have 16 here"):
            await engine.reserve(lease, 17)
        await engine.release(lease)


async def test_token_ids_that_cannot_be_are_an_error_of_who_sent_them_alone() -> None:
    async with running_engine() as engine:
        with pytest.raises(InternalError, match="OverflowError"):
            await engine.acquire_prefix([2**40] * 5, b"")
        assert await tokens_of(engine.generate(ask([1]))) == fake_output([1], 4)


async def test_leases_and_requests_under_pressure_all_come_to_their_end() -> None:
    """More of everything than there are blocks: imports, prompts computed here and prompts held, each several times."""
    async with running_engine() as engine:

        async def imported(start: int) -> None:
            prompt = range(start, start + 18)
            lease = await engine.acquire_prefix(prompt, b"")
            try:
                await engine.reserve(lease, 5 - len(lease.block_ids))
                for index in range(lease.num_cached_blocks, 5):
                    part = prompt[index * 4 : index * 4 + 4]
                    values = torch.frombuffer(engine.memory.view(lease.block_ids[index]), dtype=torch.float32)
                    values.view(2, 4, 2)[0, : len(part), 0] = torch.tensor(part, dtype=torch.float32)
                first = fake_next(prompt)
                tokens = await tokens_after(engine.generate(ask(prompt, 20), ImportedPrompt(lease, first)), [first])
                assert tokens == fake_output(prompt, 20)
            finally:
                await engine.release(lease)

        async def computed(start: int) -> None:
            prompt = range(start, start + 14)
            assert await tokens_of(engine.generate(ask(prompt, 24))) == fake_output(prompt, 24)

        async def held(start: int) -> None:
            async with contextlib.aclosing(engine.prefill(ask(range(start, start + 22)))) as updates:
                async for update in updates:
                    last = update
                assert last.output is not None
                assert last.output.token_ids == (fake_next(range(start, start + 22)),)

        starts = range(0, 70, 5)
        await asyncio.gather(*(work(start) for start in starts for work in (imported, computed, held)))


async def tokens_after(stream: OutputStream, tokens: list[int]) -> list[int]:
    async for output in stream:
        assert output.first_token_index == len(tokens)
        tokens += output.token_ids
    return tokens


# What it refuses


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask([]), "prompt is empty"),
        (ask([0] * 64), "takes 64 in all"),
        (ask([97]), "outside the vocabulary: ids go from 0 to 96"),
        (ask([-1]), "outside the vocabulary"),
        (EngineRequest("r", (1,), SamplingParams(top_p=0.0)), "top_p"),
    ],
)
async def test_requests_that_can_never_run(request_: EngineRequest, message: str) -> None:
    async with running_engine() as engine:
        for refuse in (engine.validate, engine.generate, engine.prefill):
            with pytest.raises(InvalidRequestError, match=message):
                refuse(request_)
        lease = await engine.acquire_prefix([1, 2], b"")
        await engine.reserve(lease, 1)
        # The lease passed to it all the same, so it is free again.
        with pytest.raises(InvalidRequestError, match=message):
            engine.generate(request_, ImportedPrompt(lease, 5))


async def test_an_imported_lease_that_was_released_fails_its_request() -> None:
    async with running_engine() as engine:
        lease = await engine.acquire_prefix([1, 2], b"")
        await engine.release(lease)
        stream = engine.generate(ask([1, 2]), ImportedPrompt(lease, 5))
        with pytest.raises(InternalError, match="given back already"):
            await tokens_of(stream)
        await stream.aclose()


# Failures and the end


async def test_a_failing_step_fails_its_requests_and_the_engine_goes_on() -> None:
    failures = iter([True])

    def fail_once() -> None:
        if next(failures, False):
            raise RuntimeError("no such kernel")

    async with running_engine(on_forward=fail_once) as engine:
        stream = engine.generate(ask([1, 2]))
        with pytest.raises(InternalError, match="RuntimeError: no such kernel"):
            await tokens_of(stream)
        await stream.aclose()
        assert await tokens_of(engine.generate(ask([1, 2]))) == fake_output([1, 2], 4)


async def test_close_ends_everything_that_waits() -> None:
    gate = Gate()
    engine = LocalEngine(CONFIG, FakeLoader(gate))
    await engine.start(lambda done, total: None)
    running = engine.generate(ask(range(12)))
    held = BlockLease()
    await engine.reserve(held, 16)
    await gate.step_begins()
    reserving = asyncio.create_task(engine.reserve(BlockLease(), 16))
    acquiring = asyncio.create_task(engine.acquire_prefix([1, 2], b""))
    await asyncio.sleep(0)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    gate.open()
    await closing
    for waiting in (reserving, acquiring):
        with pytest.raises(UnavailableError, match="engine was closed"):
            await waiting
    with pytest.raises(UnavailableError, match="engine was closed"):
        await tokens_of(running)
    # Whatever comes later is refused, or does nothing.
    with pytest.raises(UnavailableError):
        engine.generate(ask([1]))
    with pytest.raises(UnavailableError):
        await engine.reserve(held, 1)
    await running.aclose()
    await engine.release(held)
    await engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


async def test_a_defect_outside_a_step_ends_the_engine_and_tells_everybody() -> None:
    gate = Gate()
    engine = LocalEngine(CONFIG, FakeLoader(gate))
    await engine.start(lambda done, total: None)
    stream = engine.generate(ask(range(12)))
    await gate.step_begins()
    # No worker may make a lease up: its blocks are not its own.
    made_up = asyncio.create_task(engine.reserve(BlockLease([3]), 1))
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(InternalError, match="AssertionError"):
        await made_up
    with pytest.raises(InternalError, match="AssertionError"):
        async for _ in stream:
            pass
    with pytest.raises(InternalError):
        engine.generate(ask([1]))
    await engine.close()


async def test_a_model_that_cannot_be_loaded() -> None:
    def refuse(
        source: str,
        dtype: str,
        device: torch.device,
        on_progress: Callable[[int, int], None],
        split: Split = ALONE,
        keeps_stored: Callable[[ModelConfig], bool] = fill_all,
        quantization: Quantization = UNQUANTIZED,
    ) -> LoadedModel:
        raise ConfigError(f"{source} is no model")

    engine = LocalEngine(CONFIG, refuse)
    with pytest.raises(ConfigError, match="fake is no model"):
        await engine.start(lambda done, total: None)
    await engine.close()


async def test_closing_while_the_model_loads() -> None:
    loading = threading.Event()
    go_on = threading.Event()

    def load_slowly(
        source: str,
        dtype: str,
        device: torch.device,
        on_progress: Callable[[int, int], None],
        split: Split = ALONE,
        keeps_stored: Callable[[ModelConfig], bool] = fill_all,
        quantization: Quantization = UNQUANTIZED,
    ) -> LoadedModel:
        on_progress(0, 2)
        loading.set()
        go_on.wait()
        on_progress(1, 2)
        raise AssertionError("it loads on")

    progress: list[tuple[int, int]] = []
    engine = LocalEngine(CONFIG, load_slowly)
    starting = asyncio.create_task(engine.start(lambda done, total: progress.append((done, total))))
    await asyncio.sleep(0)
    await asyncio.to_thread(loading.wait)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    with pytest.raises(UnavailableError):
        await starting
    assert progress == [(0, 2)]


async def test_block_events_tell_what_the_cache_holds() -> None:
    async with running_engine() as engine:
        known: set[bytes] = set()

        def listen(events: BlockEvents) -> None:
            known.difference_update(events.removed)
            known.update(events.stored)

        engine.subscribe_blocks(listen)
        prompt = range(20)
        tokens = [*prompt, *await tokens_of(engine.generate(ask(prompt)))]
        assert known == set(block_hashes(tokens[:-1], 4, root_hash()))
        for start in range(0, 60, 7):
            await tokens_of(engine.generate(ask(range(start, start + 30))))
        assert len(known) == engine.status().num_cached_blocks
        assert block_hashes(tokens, 4, root_hash())[4] not in known
