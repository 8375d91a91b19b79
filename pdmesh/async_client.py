"""The client for programs with an event loop; `pdmesh.client` has its twin without one.

async with AsyncClient("127.0.0.1:50051") as client:
    result = await client.generate("The capital of France is", max_tokens=8, temperature=0)
    async for event in client.stream(messages=[{"role": "user", "content": "Hello"}]):
        ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Self, Unpack

from pdmesh.channels import ChannelPool
from pdmesh.client_calls import (
    CONTROL_TIMEOUT_S,
    GenerateOptions,
    Message,
    detokenize_request,
    generate_request,
    mesh_errors,
    tokenize_request,
)
from pdmesh.cluster_view import ServerInfo, WorkerStatus, WorkerView
from pdmesh.generation import Event, EventCollector, GenerationResult, event_from_pb
from pdmesh.transfers import WorkerTransfers
from pdmesh.types import ModelInfo
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc


class AsyncClient:
    """Speaks to one router, over one connection made at first use. Belongs to the event loop that first uses it."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        self.address = address
        # Not a channel made here: a grpc.aio channel binds to the loop that is current, and there may be none yet.
        self._channels = ChannelPool()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends every call and the connection."""
        await self._channels.aclose()

    @property
    def _inference(self) -> inference_pb2_grpc.InferenceAsyncStub:
        return inference_pb2_grpc.InferenceStub(self._channels.get(self.address))

    @property
    def _cluster(self) -> cluster_pb2_grpc.ClusterAsyncStub:
        return cluster_pb2_grpc.ClusterStub(self._channels.get(self.address))

    async def generate(
        self, text: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationResult:
        """Generates and returns the whole answer; see GenerateOptions for what it takes."""
        collector = EventCollector()
        async for event in self.stream(text, timeout_s=timeout_s, **options):
            collector.add(event)
        return collector.result()

    def stream(
        self, text: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """Generates, event by event. `aclose()` on the iterator, or leaving the loop early, cancels the work.

        The request starts when the first event is asked for, and its `timeout_s` with it.
        """
        return self._events(generate_request(text, options), timeout_s)

    async def _events(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[Event, None]:
        with mesh_errors(self.address):
            call = self._inference.Generate(request, timeout=timeout_s)
            try:
                async for message in call:
                    event = event_from_pb(message)
                    if event is not None:
                        yield event
            finally:
                call.cancel()

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        model: str = "",
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> tuple[int, ...]:
        """The prompt's token ids, as `generate` would see them."""
        request = tokenize_request(text, messages, model)
        with mesh_errors(self.address):
            return tuple((await self._inference.Tokenize(request, timeout=timeout_s)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout_s: float = CONTROL_TIMEOUT_S
    ) -> str:
        request = detokenize_request(token_ids, model)
        with mesh_errors(self.address):
            return (await self._inference.Detokenize(request, timeout=timeout_s)).text

    async def models(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models that live workers serve."""
        with mesh_errors(self.address):
            response = await self._inference.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout_s)
            return tuple(map(ModelInfo.from_pb, response.models))

    async def server_info(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> ServerInfo:
        with mesh_errors(self.address):
            request = inference_pb2.GetServerInfoRequest()
            return ServerInfo.from_pb(await self._inference.GetServerInfo(request, timeout=timeout_s))

    async def workers(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[WorkerView, ...]:
        """Every worker that the router knows."""
        with mesh_errors(self.address):
            response = await self._cluster.ListWorkers(cluster_pb2.ListWorkersRequest(), timeout=timeout_s)
            return tuple(map(WorkerView.from_pb, response.workers))

    async def worker_status(self, worker_id: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> WorkerStatus:
        """What one worker says that it holds, and the ranks that it computes with."""
        with mesh_errors(self.address):
            request = cluster_pb2.GetWorkerStatusRequest(worker_id=worker_id)
            response = await self._cluster.GetWorkerStatus(request, timeout=timeout_s)
            return WorkerStatus.from_pb(response.status)

    async def transfers(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[WorkerTransfers, ...]:
        """What each worker that the router knows says of its KV transfers, or why it does not answer."""
        with mesh_errors(self.address):
            response = await self._cluster.ListTransfers(cluster_pb2.ClusterListTransfersRequest(), timeout=timeout_s)
            return tuple(map(WorkerTransfers.from_pb, response.workers))

    async def drain(self, worker_id: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Asks a worker to finish what it has, take nothing new, and leave."""
        with mesh_errors(self.address):
            await self._cluster.DrainWorker(cluster_pb2.DrainWorkerRequest(worker_id=worker_id), timeout=timeout_s)
