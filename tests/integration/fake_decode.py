"""Decode workers that compute by hand: real gRPC servers, announced like real workers, that fail on request.

token i of completion c = script(prompt, c)[i], then the end-of-text token
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvstore.announcer import Announcer
from kvstore.directory import Directory
from kvstore.tiers.base import Tier
from pdmesh.errors import MeshError, PreconditionError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.server import GrpcServer
from pdmesh.types import Load, ModelInfo, PairingFacts, Role, WorkerInfo, WorkerState
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc, common_pb2, decode_pb2, decode_pb2_grpc
from tests.tiny_text import END_ID, VOCAB_SIZE

FACTS = PairingFacts("digest", "float32", "float32", 16, 2, 2, 8, "LKHTD")
MODEL = ModelInfo("tiny", "LlamaForCausalLM", VOCAB_SIZE, 512)

Script = Callable[[Sequence[int], int], Sequence[int]]


def letters(prompt: Sequence[int], completion: int) -> list[int]:
    """A different run of 40 printable characters for each prompt and completion."""
    start = sum(prompt) * 7 + completion * 11
    # The alphabet's tokens begin with "!", as tests/tiny_text.py sorts them.
    return [(start + 5 * place) % 90 for place in range(40)]


@dataclass(eq=False)
class Fault:
    """What goes wrong in the middle of a request. Workers that share one suffer it `times` times in all.

    Attributes:
        after: Tokens that the request was sent before.
        how: "status": it ends with `error`; "server": the whole server goes away; "silence": nothing more comes;
            "end": as "status", in place of the word that a completion has ended.
    """

    after: int = 0
    how: Literal["status", "server", "silence", "end"] = "status"
    error: MeshError = field(default_factory=lambda: UnavailableError("rank died", stage="decode"))
    times: int = 1

    def due(self, num_sent: int, *, at_end: bool = False) -> bool:
        if not self.times or (self.how == "end") is not at_end or (num_sent != self.after and not at_end):
            return False
        self.times -= 1
        return True


@dataclass(eq=False)
class FakeDecode:
    """Use as `async with FakeDecode(directory, "decode-0") as worker:`.

    Attributes:
        script: What it generates.
        refuse_with: Raised for each request before any token.
        gate: Where set, waited for before the first token.
        first_index: Skew of the absolute indices that it sends.
        silent: Does not answer what it is asked about itself.
        requests: All that came.
        times_left: Seconds that each request had left when it came.
        cancelled: Set when a request was cancelled under it.
    """

    directory: Directory
    worker_id: str
    script: Script = letters
    refuse_with: MeshError | None = None
    fault: Fault | None = None
    gate: asyncio.Event | None = None
    first_index: int = 0
    tokens_per_message: int = 1
    model: ModelInfo = MODEL
    state: WorkerState = WorkerState.READY
    role: Role = Role.DECODE
    facts: PairingFacts = FACTS
    silent: bool = False
    requests: list[decode_pb2.DecodeGenerateRequest] = field(default_factory=list)
    times_left: list[float] = field(default_factory=list)
    num_running: int = 0
    drained: bool = False

    def __post_init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self._server = GrpcServer("127.0.0.1", 0)
        self._server.add(decode_pb2_grpc.add_DecodeServicer_to_server, _Servicer(self), "pdmesh.v1.Decode")
        self._server.add(cluster_pb2_grpc.add_WorkerServicer_to_server, _Worker(self), "pdmesh.v1.Worker")
        self._announcer = Announcer(self.directory, lambda: self.info, heartbeat_s=0.1)
        self._stopping: asyncio.Task[None] | None = None

    @property
    def info(self) -> WorkerInfo:
        info = WorkerInfo(
            self.worker_id, f"{self.worker_id}-1", self.role, self.state, self._server.address, load=Load(num_blocks=64,
            num_free_blocks=64, num_running=self.num_running),
        )  # fmt: skip
        return info if self.state is WorkerState.LOADING else replace(info, facts=self.facts, model=self.model)

    async def __aenter__(self) -> "FakeDecode":
        await self._server.start()
        await self._announcer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._announcer.stop()
        if self._stopping is not None:
            await self._stopping
        await self._server.stop()

    def hold(self, hashes: Sequence[BlockHash], tier: Tier = Tier.POOL) -> None:
        """Announces blocks."""
        self._announcer.on_blocks(hashes, (), tier)

    async def become(self, state: WorkerState) -> None:
        self.state = state
        self._announcer.kick()

    async def outputs(
        self, request: decode_pb2.DecodeGenerateRequest
    ) -> AsyncIterator[decode_pb2.DecodeGenerateResponse]:
        """All completions, token by token in turn."""
        delivered = {point.index: point for point in request.resume}
        params = request.sampling_params
        running = []
        for index in range(params.n):
            point = delivered.get(index, decode_pb2.ResumePoint())
            tokens = [*self.script(request.prompt_token_ids, index), END_ID]
            if not point.finished:
                assert list(point.output_token_ids) == tokens[: len(point.output_token_ids)]
                running.append(_Output(index, tokens, len(point.output_token_ids)))
        num_sent = 0
        if self.gate is not None:
            await self.gate.wait()
        while running:
            for output in list(running):
                await self._misbehave(num_sent)
                message = output.next(params, self.tokens_per_message)
                num_sent += len(message.tokens.token_ids)
                message.tokens.first_token_index += self.first_index
                yield message
                if output.reason is not None:
                    running.remove(output)
                    if self.fault is not None and self.fault.due(num_sent, at_end=True):
                        raise self.fault.error
                    yield decode_pb2.DecodeGenerateResponse(finished=output.finished())

    async def _misbehave(self, num_sent: int) -> None:
        if self.fault is None or not self.fault.due(num_sent):
            return
        if self.fault.how == "status":
            raise self.fault.error
        if self.fault.how == "server":
            self._stopping = asyncio.create_task(self._server.stop())
        await asyncio.Event().wait()


@dataclass(eq=False)
class _Output:
    index: int
    tokens: Sequence[int]
    place: int
    reason: common_pb2.FinishReason.ValueType | None = None

    def next(self, params: common_pb2.SamplingParams, count: int) -> decode_pb2.DecodeGenerateResponse:
        first = self.place
        new: list[int] = []
        while len(new) < count and self.reason is None:
            token_id = self.tokens[self.place]
            self.place += 1
            new.append(token_id)
            if token_id in params.stop_token_ids and self.place > params.min_tokens:
                self.reason = common_pb2.FINISH_REASON_STOP
            elif self.place >= params.max_tokens:
                self.reason = common_pb2.FINISH_REASON_LENGTH
        tokens = decode_pb2.DecodeTokens(index=self.index, first_token_index=first, token_ids=new, cached_tokens=16)
        return decode_pb2.DecodeGenerateResponse(tokens=tokens)

    def finished(self) -> decode_pb2.DecodeFinished:
        assert self.reason is not None
        finished = decode_pb2.DecodeFinished(index=self.index, finish_reason=self.reason)
        if self.reason == common_pb2.FINISH_REASON_STOP:
            finished.matched_token_id = self.tokens[self.place - 1]
        return finished


class _Servicer(decode_pb2_grpc.DecodeServicer):
    def __init__(self, fake: FakeDecode) -> None:
        self._fake = fake

    async def Generate(
        self, request: decode_pb2.DecodeGenerateRequest, context: Any
    ) -> AsyncIterator[decode_pb2.DecodeGenerateResponse]:
        fake = self._fake
        fake.times_left.append(context.time_remaining())
        fake.requests.append(request)
        if request.expected_incarnation != fake.info.incarnation:
            raise PreconditionError("restarted", reason="STALE_INCARNATION")
        if fake.refuse_with is not None:
            raise fake.refuse_with
        fake.num_running += 1
        fake.started.set()
        try:
            lost = decode_pb2.PrefillFailure(worker_id="prefill-8", incarnation="x", unreachable=True)
            report = decode_pb2.PrefillReport(worker_id="prefill-9", transport="tcp", kv_bytes=4096, failures=[lost])
            yield decode_pb2.DecodeGenerateResponse(prefill=report)
            async for message in fake.outputs(request):
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            fake.cancelled.set()
            raise
        finally:
            fake.num_running -= 1


class _Worker(cluster_pb2_grpc.WorkerServicer):
    def __init__(self, fake: FakeDecode) -> None:
        self._fake = fake

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: object) -> cluster_pb2.GetStatusResponse:
        return cluster_pb2.GetStatusResponse(info=self._fake.info.to_pb())

    async def ListTransfers(
        self, request: cluster_pb2.WorkerListTransfersRequest, context: object
    ) -> cluster_pb2.WorkerListTransfersResponse:
        if self._fake.silent:
            await asyncio.Event().wait()
        return cluster_pb2.WorkerListTransfersResponse(report=cluster_pb2.TransferReport(num_tickets=3))

    async def Drain(self, request: cluster_pb2.DrainRequest, context: object) -> cluster_pb2.DrainResponse:
        self._fake.drained = True
        return cluster_pb2.DrainResponse()
