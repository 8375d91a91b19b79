"""A real router over real sockets, with decode workers that compute by hand and fail on request."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.announcer import Announcer
from kvstore.memory_directory import MemoryDirectory
from kvstore.tiers.base import Tier
from pdmesh import AsyncClient, status
from pdmesh.errors import (
    DeadlineError,
    InvalidRequestError,
    MeshError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from pdmesh.hashing import block_hashes, root_hash
from pdmesh.types import KVSource, Role, WorkerInfo, WorkerState
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from router.config import RouterConfig
from router.service import RouterService
from tests.integration.fake_decode import FACTS, FakeDecode, Fault, letters
from tests.tiny_text import END_ID, VOCAB_SIZE, make_text_model, tiny_tokenizer

PROMPT = [72, 101, 108, 108, 111]
TOKENIZER = tiny_tokenizer()


class Bed:
    """A router, the directory it watches, and a channel to it."""

    def __init__(self, service: RouterService, directory: MemoryDirectory, channel: grpc.aio.Channel) -> None:
        self.service = service
        self.directory = directory
        self.channel = channel
        self.inference: Any = inference_pb2_grpc.InferenceStub(channel)
        self.cluster: Any = cluster_pb2_grpc.ClusterStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.01)

    async def until_known(self, num_workers: int) -> None:
        async with asyncio.timeout(5):
            while len(await self.workers()) < num_workers:
                await asyncio.sleep(0.01)

    async def until_state(self, worker_id: str, state: WorkerState) -> None:
        async with asyncio.timeout(5):
            while WorkerInfo.from_pb((await self.workers())[worker_id].info).state is not state:
                await asyncio.sleep(0.01)

    async def workers(self) -> dict[str, cluster_pb2.WorkerView]:
        response = await self.cluster.ListWorkers(cluster_pb2.ListWorkersRequest())
        return {view.info.worker_id: view for view in response.workers}

    async def assert_idle(self) -> None:
        """Nothing is counted anywhere any more."""
        await self.until(lambda: not self.service.num_active_requests)
        assert all(not view.num_assigned for view in (await self.workers()).values())

    async def generate(self, timeout: float = 10, **fields: Any) -> "Answer":
        answer = Answer()
        await answer.read(self.inference.Generate(request(**fields), timeout=timeout))
        return answer


class Answer:
    """What a client got; checks that indices go up without gap or repetition."""

    def __init__(self) -> None:
        self.started: inference_pb2.GenerateStarted | None = None
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.completes: dict[int, inference_pb2.GenerateComplete] = {}

    async def read(self, call: Any) -> None:
        try:
            async for response in call:
                self.take(response)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        kind = response.WhichOneof("event")
        if kind == "started":
            assert self.started is None
            self.started = response.started
            return
        assert self.started is not None
        if kind == "complete":
            assert response.complete.index not in self.completes
            self.completes[response.complete.index] = response.complete
            return
        chunk = response.chunk
        assert chunk.index not in self.completes, "text after the end"
        tokens = self.tokens.setdefault(chunk.index, [])
        assert chunk.first_token_index == len(tokens)
        tokens.extend(chunk.token_ids)
        self.texts[chunk.index] = self.texts.get(chunk.index, "") + chunk.text
        assert chunk.usage.completion_tokens == len(tokens)


def request(
    tokens: list[int] | None = None, text: str | None = None, model: str = "", salt: str = "", **params: Any
) -> inference_pb2.GenerateRequest:
    message = inference_pb2.GenerateRequest(
        model=model, cache_salt=salt, sampling_params=common_pb2.SamplingParams(**params)
    )
    if text is not None:
        message.text = text
    else:
        message.tokens.ids.extend(PROMPT if tokens is None else tokens)
    return message


def spelled(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_text_model(tmp_path / "tiny")


@asynccontextmanager
async def routing(model: Path, *workers: FakeDecode, **config: Any) -> AsyncIterator[Bed]:
    """A router with these workers, SERVING."""
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        directory = workers[0].directory
        assert isinstance(directory, MemoryDirectory)
        bed = await stack.enter_async_context(starting(model, directory, **config))
        await bed.until(lambda: bed.service.serving)
        yield bed
        await bed.assert_idle()


@asynccontextmanager
async def starting(model: Path, directory: MemoryDirectory, **config: Any) -> AsyncIterator[Bed]:
    """A router, whatever its health."""
    service = RouterService(RouterConfig(model=str(model), **config), directory)
    try:
        await service.start()
        async with grpc.aio.insecure_channel(service.address) as channel:
            yield Bed(service, directory, channel)
    finally:
        await service.close()


async def test_tokens_text_usage_and_report(model: Path) -> None:
    directory = MemoryDirectory()
    async with routing(model, FakeDecode(directory, "decode-0")) as bed:
        answer = await bed.generate()
    expected = letters(PROMPT, 0)
    assert answer.tokens == {0: [*expected, END_ID]}
    assert answer.texts == {0: TOKENIZER.decode(expected)}
    assert answer.started is not None
    assert answer.started.prompt_tokens == len(PROMPT)
    assert answer.started.model == "tiny"
    complete = answer.completes[0]
    assert complete.finish_reason == common_pb2.FINISH_REASON_STOP
    assert complete.matched_token_id == END_ID
    assert complete.usage == common_pb2.Usage(
        prompt_tokens=len(PROMPT), completion_tokens=len(expected) + 1, cached_tokens=16
    )
    report = complete.report
    assert (report.decode_worker_id, report.prefill_worker_id, report.kv_transport) == ("decode-0", "prefill-9", "tcp")
    assert report.ttft_s > 0


async def test_workers_get_token_ids_seed_and_clipped_limits(model: Path) -> None:
    worker = FakeDecode(MemoryDirectory(), "decode-0")
    async with routing(model, worker) as bed:
        answer = await bed.generate(text=" hello", max_tokens=10_000, stop_token_ids=[7])
    sent = worker.requests[0]
    assert list(sent.prompt_token_ids) == TOKENIZER.encode(" hello").ids
    assert sent.attempt == 1
    assert sent.expected_incarnation == "decode-0-1"
    assert sent.sampling_params.max_tokens == 512 - len(sent.prompt_token_ids)
    assert list(sent.sampling_params.stop_token_ids) == [7, END_ID]
    assert answer.started is not None
    assert sent.sampling_params.seed == answer.started.seed


@pytest.mark.parametrize(
    "refusal",
    [
        OverloadedError("full", reason="WORKER_FULL"),
        UnavailableError("draining", reason="WORKER_DRAINING"),
        PreconditionError("restarted", reason="STALE_INCARNATION"),
    ],
    ids=lambda error: error.reason,
)
async def test_a_worker_that_refuses_is_followed_by_the_next(model: Path, refusal: MeshError) -> None:
    directory = MemoryDirectory()
    workers = [FakeDecode(directory, f"decode-{i}", refuse_with=refusal) for i in range(3)]
    async with routing(model, *workers) as bed:
        await bed.until_known(3)
        workers[1].refuse_with = None
        for _ in range(3):
            answer = await bed.generate(max_tokens=8)
            assert answer.tokens == {0: letters(PROMPT, 0)[:8]}
            assert answer.completes[0].report.decode_worker_id == "decode-1"
            assert answer.completes[0].report.decode_resumes == 0
    assert workers[0].requests, "nobody refused"


async def test_full_everywhere_is_told_at_once_each_worker_asked_once(model: Path) -> None:
    directory = MemoryDirectory()
    workers = [FakeDecode(directory, f"decode-{i}", refuse_with=OverloadedError("full")) for i in range(3)]
    async with routing(model, *workers) as bed:
        await bed.until_known(3)
        with pytest.raises(OverloadedError) as caught:
            await bed.generate()
        assert caught.value.reason == "ALL_WORKERS_FULL"
    assert [len(worker.requests) for worker in workers] == [1, 1, 1]


async def test_a_full_router_refuses_before_it_looks_at_the_request(model: Path) -> None:
    worker = FakeDecode(MemoryDirectory(), "decode-0", fault=Fault(after=1, how="silence"))
    async with routing(model, worker, max_active_requests=1) as bed:
        first = bed.inference.Generate(request())
        await worker.started.wait()
        with pytest.raises(OverloadedError) as caught:
            await bed.generate(model="no such model")
        assert caught.value.reason == "ROUTER_FULL"
        first.cancel()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("how", ["status", "server"])
async def test_resume_loses_and_repeats_nothing(model: Path, n: int, how: Literal["status", "server"]) -> None:
    directory = MemoryDirectory()
    fault = Fault(after=7 * n, how=how)
    workers = [FakeDecode(directory, f"decode-{i}", fault=fault) for i in range(2)]
    async with routing(model, *workers) as bed:
        await bed.until_known(2)
        answer = await bed.generate(n=n, max_tokens=30)
    assert fault.times == 0, "the fault did not happen"
    assert answer.tokens == {index: letters(PROMPT, index)[:30] for index in range(n)}
    assert answer.texts == {index: TOKENIZER.decode(letters(PROMPT, index)[:30]) for index in range(n)}
    assert {complete.report.decode_resumes for complete in answer.completes.values()} == {1}
    first, second = sorted((worker.requests[0] for worker in workers), key=lambda sent: sent.attempt)
    assert (first.attempt, second.attempt) == (1, 2)
    assert second.sampling_params == first.sampling_params
    assert [len(point.output_token_ids) for point in second.resume] == [7] * n


async def test_resume_leaves_ended_completions_alone(model: Path) -> None:
    def uneven(prompt: Sequence[int], completion: int) -> list[int]:
        return letters(prompt, completion)[: 2 if completion == 0 else 20]

    directory, fault = MemoryDirectory(), Fault(after=9)
    workers = [FakeDecode(directory, f"decode-{i}", uneven, fault=fault) for i in range(2)]
    async with routing(model, *workers) as bed:
        await bed.until_known(2)
        answer = await bed.generate(n=2)
    assert answer.tokens == {index: [*uneven(PROMPT, index), END_ID] for index in range(2)}
    resumed = max((worker.requests[0] for worker in workers), key=lambda sent: sent.attempt)
    assert [point.finished for point in resumed.resume] == [True, False]


async def test_an_end_that_was_lost_with_its_worker_is_told_without_another(model: Path) -> None:
    """The last token came and the word of the end did not: nothing is left to generate."""
    fault = Fault(how="end", times=2)
    worker = FakeDecode(MemoryDirectory(), "decode-0", fault=fault)
    async with routing(model, worker) as bed:
        by_length = await bed.generate(max_tokens=5)
        by_token = await bed.generate()
    assert fault.times == 0, "the fault did not happen"
    assert len(worker.requests) == 2
    assert by_length.completes[0].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert by_token.completes[0].finish_reason == common_pb2.FINISH_REASON_STOP
    assert by_token.completes[0].matched_token_id == END_ID
    assert by_token.tokens == {0: [*letters(PROMPT, 0), END_ID]}


async def test_tokens_that_skip_an_index_are_not_believed(model: Path) -> None:
    directory = MemoryDirectory()
    liar = FakeDecode(directory, "decode-0", first_index=1)
    async with routing(model, liar) as bed:
        with pytest.raises(UnavailableError, match="token 1 came where token 0 was due"):
            await bed.generate()


async def test_workers_that_die_one_after_the_other_end_the_request(model: Path) -> None:
    fault = Fault(after=1, times=100)
    worker = FakeDecode(MemoryDirectory(), "decode-0", fault=fault)
    async with routing(model, worker) as bed:
        with pytest.raises(UnavailableError) as caught:
            await bed.generate()
    assert caught.value.reason == "TOO_MANY_RESUMES"
    assert len(worker.requests) == 5


async def test_the_deadline_holds_under_a_silent_worker(model: Path) -> None:
    worker = FakeDecode(MemoryDirectory(), "decode-0", fault=Fault(after=3, how="silence"))
    async with routing(model, worker) as bed:
        with pytest.raises(DeadlineError):
            await bed.generate(timeout=0.5)
        assert 0 < worker.times_left[0] <= 0.5, "the worker was told a later one"
        async with asyncio.timeout(1):
            await worker.cancelled.wait()


@pytest.mark.parametrize("silent_after", [0, 3])
async def test_a_client_that_leaves_is_noticed_by_the_worker(model: Path, silent_after: int) -> None:
    worker = FakeDecode(MemoryDirectory(), "decode-0", fault=Fault(after=silent_after, how="silence"))
    async with routing(model, worker) as bed:
        call = bed.inference.Generate(request())
        await worker.started.wait()
        call.cancel()
        async with asyncio.timeout(1):
            await worker.cancelled.wait()


async def test_a_client_that_leaves_in_the_middle_of_the_stream_is_noticed(model: Path) -> None:
    def endless(prompt: Sequence[int], completion: int) -> list[int]:
        return [5] * 400

    worker = FakeDecode(MemoryDirectory(), "decode-0", endless)
    async with routing(model, worker) as bed:
        call = bed.inference.Generate(request(max_tokens=400))
        num_chunks = 0
        async for response in call:
            num_chunks += response.HasField("chunk")
            if num_chunks == 2:
                break
        call.cancel()
        await bed.until(lambda: worker.num_running == 0)


@pytest.mark.parametrize("per_message", [1, 3, 100])
async def test_a_stop_string_across_tokens_ends_the_text_and_the_work(model: Path, per_message: int) -> None:
    def speech(prompt: Sequence[int], completion: int) -> list[int]:
        return spelled("one two STxOP three STOP four")

    worker = FakeDecode(MemoryDirectory(), "decode-0", speech, tokens_per_message=per_message)
    async with routing(model, worker) as bed:
        answer = await bed.generate(stop=["STOP", "never"])
        included = await bed.generate(stop=["STOP"], include_stop_str_in_output=True)
        late = await bed.generate(stop=["two", "four"], min_tokens=8)
    assert answer.texts == {0: "one two STxOP three "}
    assert answer.tokens == {0: spelled("one two STxOP three STOP")}
    complete = answer.completes[0]
    assert complete.finish_reason == common_pb2.FINISH_REASON_STOP
    assert complete.matched_stop_str == "STOP"
    assert complete.usage.completion_tokens == len(spelled("one two STxOP three STOP"))
    assert included.texts == {0: "one two STxOP three STOP"}
    assert late.completes[0].matched_stop_str == "four"


async def test_a_stop_string_cancels_the_worker_when_the_last_completion_ends(model: Path) -> None:
    def speech(prompt: Sequence[int], completion: int) -> list[int]:
        return spelled("a" * (completion + 1) + "." + "b" * 300)

    worker = FakeDecode(MemoryDirectory(), "decode-0", speech)
    async with routing(model, worker) as bed:
        answer = await bed.generate(stop=["."], n=3)
        async with asyncio.timeout(1):
            await worker.cancelled.wait()
    assert answer.texts == {0: "a", 1: "aa", 2: "aaa"}


async def test_what_a_stop_string_holds_back_comes_at_the_end(model: Path) -> None:
    def speech(prompt: Sequence[int], completion: int) -> list[int]:
        return spelled("almost STO")

    async with routing(model, FakeDecode(MemoryDirectory(), "decode-0", speech)) as bed:
        answer = await bed.generate(stop=["STOP"])
    assert answer.texts == {0: "almost STO"}
    assert answer.completes[0].matched_token_id == END_ID


@pytest.mark.parametrize(
    ("fields", "expected", "reason"),
    [
        ({"model": "gpt-9"}, NotFoundError, "MODEL_NOT_FOUND"),
        ({"text": "x" * 10_000_000}, InvalidRequestError, "TEXT_TOO_LONG"),
        ({"text": ""}, InvalidRequestError, "EMPTY_INPUT"),
        ({"tokens": []}, InvalidRequestError, "EMPTY_INPUT"),
        ({"tokens": [1] * 512}, InvalidRequestError, "PROMPT_TOO_LONG"),
        ({"text": "x" * 512}, InvalidRequestError, "PROMPT_TOO_LONG"),
        ({"tokens": [VOCAB_SIZE]}, InvalidRequestError, "TOKEN_NOT_IN_VOCABULARY"),
        ({"temperature": -1.0}, InvalidRequestError, "INVALID_SAMPLING_PARAMS"),
        ({"n": 17}, InvalidRequestError, "INVALID_SAMPLING_PARAMS"),
        ({"salt": "s" * 257}, InvalidRequestError, "CACHE_SALT_TOO_LONG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_can_never_succeed_reaches_no_worker(
    model: Path, fields: dict[str, Any], expected: type[MeshError], reason: str
) -> None:
    worker = FakeDecode(MemoryDirectory(), "decode-0")
    async with routing(model, worker) as bed:
        with pytest.raises(expected) as caught:
            await bed.generate(**fields)
    assert caught.value.reason == reason
    assert not worker.requests


async def test_health_follows_the_workers(model: Path) -> None:
    directory = MemoryDirectory()
    async with starting(model, directory) as bed:
        states = health_pb2.HealthCheckResponse

        async def health() -> int:
            response = await bed.health.Check(health_pb2.HealthCheckRequest(service="pdmesh.v1.Inference"))
            return int(response.status)

        assert await health() == states.NOT_SERVING
        with pytest.raises(UnavailableError) as caught:
            await bed.generate()
        assert caught.value.reason == "NO_DECODE_WORKER"
        decode = FakeDecode(directory, "decode-0", state=WorkerState.LOADING)
        prefill = FakeDecode(directory, "prefill-0", state=WorkerState.LOADING, role=Role.PREFILL)
        async with decode, prefill:
            await decode.become(WorkerState.READY)
            await bed.until_known(2)
            await bed.until_state("decode-0", WorkerState.READY)
            assert await health() == states.NOT_SERVING, "a prefill worker is on its way"
            await prefill.become(WorkerState.READY)
            await bed.until(lambda: bed.service.serving)
            assert await health() == states.SERVING
            await prefill.become(WorkerState.LOADING)
            await bed.until_state("prefill-0", WorkerState.LOADING)
            assert await health() == states.SERVING, "decode workers compute prompts, too"
            await decode.become(WorkerState.DRAINING)
            await bed.until(lambda: not bed.service.serving)
            assert await health() == states.NOT_SERVING


async def test_drain_lets_requests_end_and_takes_none(model: Path) -> None:
    gate = asyncio.Event()
    worker = FakeDecode(MemoryDirectory(), "decode-0", gate=gate)
    async with routing(model, worker) as bed:
        running = asyncio.create_task(bed.generate())
        await worker.started.wait()
        draining = asyncio.create_task(bed.service.drain())
        await bed.until(lambda: not bed.service.serving)
        with pytest.raises(UnavailableError) as caught:
            await bed.generate()
        assert caught.value.reason == "ROUTER_DRAINING"
        assert not draining.done()
        gate.set()
        assert (await running).tokens == {0: [*letters(PROMPT, 0), END_ID]}
        await draining


async def test_a_long_prompt_names_prefill_workers_that_can_pair(model: Path) -> None:
    directory = MemoryDirectory()
    decode = FakeDecode(directory, "decode-0")
    prefills = [FakeDecode(directory, f"prefill-{i}", role=Role.PREFILL) for i in range(2)]
    stranger = FakeDecode(directory, "prefill-x", role=Role.PREFILL, facts=replace(FACTS, model_digest="other"))
    async with routing(model, decode, *prefills, stranger) as bed:
        await bed.until_known(4)
        await bed.generate(tokens=[7] * 100)
        await bed.generate(tokens=[7] * 10)
        views = await bed.workers()
    assert {target.worker_id for target in decode.requests[0].prefill_targets} == {"prefill-0", "prefill-1"}
    assert decode.requests[0].prefill_targets[0].incarnation.startswith("prefill-")
    assert not decode.requests[1].prefill_targets, "short prompts are computed where they are decoded"
    assert "model_digest: other here, digest there" in views["prefill-x"].excluded_because
    assert views["prefill-0"].excluded_because == ""


async def test_a_store_takes_no_requests_and_is_named_to_the_prefill_worker(model: Path) -> None:
    directory, tokens = MemoryDirectory(), [7] * 100
    decode, prefill = FakeDecode(directory, "decode-0"), FakeDecode(directory, "prefill-0", role=Role.PREFILL)
    store = FakeDecode(directory, "store-0", role=Role.STORE)
    async with routing(model, decode, prefill, store) as bed:
        await bed.until_known(3)
        await bed.generate(tokens=tokens)
        (target,) = decode.requests[0].prefill_targets
        assert (target.worker_id, list(target.sources)) == ("prefill-0", [])
        store.hold(block_hashes(tokens, FACTS.block_size, root_hash()), Tier.DISK)
        async with asyncio.timeout(5):
            while not decode.requests[-1].prefill_targets[0].sources:
                await bed.generate(tokens=tokens)
        (target,) = decode.requests[-1].prefill_targets
        assert (await bed.workers())["store-0"].excluded_because == ""
    assert target.worker_id == "prefill-0"
    assert [KVSource.from_pb(source) for source in target.sources] == [
        KVSource("store-0", "store-0-1", store.info.address, num_blocks=6)
    ]
    assert not store.requests


async def test_other_calls(model: Path) -> None:
    worker = FakeDecode(MemoryDirectory(), "decode-0")
    async with routing(model, worker, served_model_name="alias") as bed:
        chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="hello")])
        tokens = await bed.inference.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
        assert tokens.max_model_len == 512
        text = await bed.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
        assert text.text == "<|user|>hello<|end|><|assistant|>"
        models = await bed.inference.ListModels(inference_pb2.ListModelsRequest())
        assert [(m.name, m.max_model_len) for m in models.models] == [("alias", 512)]
        info = await bed.inference.GetServerInfo(inference_pb2.GetServerInfoRequest())
        assert info.limits.max_text_bytes == 1 << 20
        asked = await bed.cluster.GetWorkerStatus(cluster_pb2.GetWorkerStatusRequest(worker_id="decode-0"))
        assert asked.status.info.worker_id == "decode-0"
        await bed.cluster.DrainWorker(cluster_pb2.DrainWorkerRequest(worker_id="decode-0"))
        assert worker.drained
        for call in (
            bed.cluster.DrainWorker(cluster_pb2.DrainWorkerRequest(worker_id="nobody")),
            bed.cluster.GetWorkerStatus(cluster_pb2.GetWorkerStatusRequest(worker_id="nobody")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert "known: decode-0" in (caught.value.details() or "")


async def test_of_a_worker_that_is_gone_the_worker_is_blamed_not_the_router(model: Path, unused_tcp_port: int) -> None:
    directory = MemoryDirectory()
    worker = FakeDecode(directory, "decode-0")
    async with routing(model, worker) as bed:
        gone = replace(worker.info, worker_id="gone", address=f"127.0.0.1:{unused_tcp_port}")
        announcer = Announcer(directory, lambda: gone, heartbeat_s=0.1)
        await announcer.start()
        try:
            await bed.until_known(2)
            async with AsyncClient(bed.service.address) as client:
                for call in (client.drain("gone"), client.worker_status("gone")):
                    with pytest.raises(UnavailableError, match=f"gone does not answer at {gone.address}") as caught:
                        await call
                    assert caught.value.reason == "WORKER_UNREACHABLE"
        finally:
            await announcer.stop()


async def test_transfers_are_told_of_all_workers_though_one_is_silent(model: Path) -> None:
    directory = MemoryDirectory()
    workers = [FakeDecode(directory, "decode-0"), FakeDecode(directory, "decode-1", silent=True)]
    async with routing(model, *workers) as bed:
        await bed.until_known(2)
        asked_at = asyncio.get_running_loop().time()
        response = await bed.cluster.ListTransfers(cluster_pb2.ClusterListTransfersRequest(), timeout=10)
        assert asyncio.get_running_loop().time() - asked_at < 5
        well, silent = response.workers
        assert (well.worker_id, well.report.num_tickets, well.error) == ("decode-0", 3, "")
        assert (silent.worker_id, silent.HasField("report")) == ("decode-1", False)
        assert "within 2 s" in silent.error


async def test_reflection_lists_the_services(model: Path) -> None:
    async with starting(model, MemoryDirectory()) as bed:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(bed.channel)  # type: ignore[arg-type]  # stubs know sync only

        async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        async for response in stub.ServerReflectionInfo(ask()):
            names = {service.name for service in response.list_services_response.service}
    assert {"pdmesh.v1.Inference", "pdmesh.v1.Cluster", "grpc.health.v1.Health"} <= names
