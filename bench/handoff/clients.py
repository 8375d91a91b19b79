"""The two ways to a first token: asking a prefill worker and nobody else, and asking the mesh."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from bench.handoff.figures import Answer
from kvstore.transfer.states import HEARTBEAT_S
from pdmesh import AsyncClient
from pdmesh.channels import ChannelPool
from pdmesh.generation import Chunk, Complete, RequestReport
from pdmesh.sampling import SamplingParams
from pdmesh.types import PairingFacts, WorkerInfo
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc, prefill_pb2_grpc
from pdmesh.v1 import kv_transfer_pb2 as kv_pb
from pdmesh.v1 import prefill_pb2 as pb

_POLL_S = 0.01


class PrefillClient:
    """Takes first tokens from a prefill worker as a decode worker does, but never grants a place for the KV.

    So the worker does what it does in the mesh, short of sending: no router, no decode worker, no transfer.

    Args:
        worker: As the router knows it, loaded.
        channels: To it; not closed here.
    """

    def __init__(self, worker: WorkerInfo, channels: ChannelPool) -> None:
        self._worker = worker
        self._stub = prefill_pb2_grpc.PrefillStub(channels.get(worker.address))
        self._numbers = itertools.count()

    async def first_token_s(self, prompt: Sequence[int]) -> float:
        """Seconds from sending the prompt to its first token. Raises RuntimeError where none comes."""
        began = time.perf_counter()
        call = self._stub.Run(self._requests(prompt))
        try:
            async for response in call:
                if response.HasField("first_token"):
                    return time.perf_counter() - began
        finally:
            call.cancel()
        raise RuntimeError(f"{self._worker.worker_id} ended before the first token")

    async def _requests(self, prompt: Sequence[int]) -> AsyncIterator[pb.RunRequest]:
        facts = self._worker.facts
        assert facts is not None, "a worker that is READY has told its facts"
        start = pb.RunStart(
            request_id=f"bench-{next(self._numbers)}",
            prompt_token_ids=prompt,
            sampling_params=_sampling(1).to_pb(),
            decode_worker_id="bench",
            expected_incarnation=self._worker.incarnation,
            facts=facts.to_pb(),
            # The one transport that is not connected to before there is a grant.
            receivers=[
                kv_pb.KVReceiver(
                    runs=[kv_pb.BlockRun(num_bytes=_block_bytes(facts))],
                    offers=[kv_pb.TransportOffer(name="grpc", address=self._worker.address)],
                )
            ],
        )
        yield pb.RunRequest(start=start)
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            yield pb.RunRequest(heartbeat=kv_pb.Heartbeat())


def _block_bytes(facts: PairingFacts) -> int:
    value_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[facts.kv_dtype]
    return 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * facts.block_size * value_bytes


async def answer(client: AsyncClient, prompt: Sequence[int], num_tokens: int, transport: str) -> Answer:
    """The mesh's answer. Raises RuntimeError where the KV took another way, or tokens are missing."""
    began = time.perf_counter()
    token_s: list[float] = []
    report = RequestReport()
    async with aclosing(client.stream(tokens=prompt, sampling=_sampling(num_tokens))) as events:
        async for event in events:
            if isinstance(event, Chunk) and event.token_ids:
                token_s += [time.perf_counter() - began] * len(event.token_ids)
            elif isinstance(event, Complete):
                report = event.report
    if report.kv_transport != transport or report.prefill_retries:
        raise RuntimeError(f"the KV was to travel over {transport}, at the first attempt; what happened: {report}")
    if len(token_s) != num_tokens:
        raise RuntimeError(f"{len(token_s)} tokens came, {num_tokens} were asked for")
    return Answer(tuple(token_s), report.kv_bytes, report.prefill_s, report.transfer_s)


async def idle(workers: Sequence[WorkerInfo], channels: ChannelPool) -> None:
    """Returns when no worker serves a request: what one measurement left undone is not the next one's to pay."""
    for worker in workers:
        stub = cluster_pb2_grpc.WorkerStub(channels.get(worker.address))
        while True:
            status = await stub.GetStatus(cluster_pb2.GetStatusRequest())
            if not status.num_requests and not status.num_request_tasks:
                break
            await asyncio.sleep(_POLL_S)


def _sampling(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
