"""A real gRPC server on a free port, with an Inference service that anyone can compute by hand."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from pdmesh.errors import NotFoundError, OverloadedError
from pdmesh.server import GrpcServer
from pdmesh.v1 import cluster_pb2, cluster_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc


class EchoInference(inference_pb2_grpc.InferenceServicer):
    """Answers with the prompt, a character a token; "full" is refused, "forever" never ends."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.cancelled = asyncio.Event()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        if request.text == "full":
            raise OverloadedError("no room for you", stage="admission", details={"limit": "8"})
        yield inference_pb2.GenerateResponse(
            started=inference_pb2.GenerateStarted(request_id="r1", model="echo", seed=7, prompt_tokens=3)
        )
        try:
            while request.text == "forever":
                yield _chunk(0, 0, "x")
                await asyncio.sleep(0.001)
        finally:
            if request.text == "forever":
                self.cancelled.set()
        for index in range(request.sampling_params.n or 1):
            for position, character in enumerate(request.text):
                yield _chunk(index, position, character)
            yield _complete(index, len(request.text))

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        text = request.text or "".join(turn.role + turn.content for turn in request.chat.messages)
        return inference_pb2.TokenizeResponse(token_ids=map(ord, text))

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        return inference_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[common_pb2.ModelInfo(name="echo", vocab_size=128)])

    async def GetServerInfo(
        self, request: inference_pb2.GetServerInfoRequest, context: Any
    ) -> inference_pb2.GetServerInfoResponse:
        limits = inference_pb2.Limits(max_n=16)
        return inference_pb2.GetServerInfoResponse(version="1.2.3", max_active_requests=8, limits=limits)


class OneWorkerCluster(cluster_pb2_grpc.ClusterServicer):
    def __init__(self) -> None:
        self.drained: list[str] = []
        loading = common_pb2.WorkerInfo(
            worker_id="w",
            role=common_pb2.ROLE_DECODE,
            state=common_pb2.WORKER_STATE_LOADING,
            loaded_bytes=1,
            kv_transports="shm,tcp",
        )
        self.workers = [cluster_pb2.WorkerView(info=loading, age_s=0.5, excluded_because="loading")]
        self.transfers = cluster_pb2.ClusterListTransfersResponse()
        self.status = cluster_pb2.GetStatusResponse(info=loading)

    async def ListWorkers(
        self, request: cluster_pb2.ListWorkersRequest, context: Any
    ) -> cluster_pb2.ListWorkersResponse:
        return cluster_pb2.ListWorkersResponse(workers=self.workers)

    async def GetWorkerStatus(
        self, request: cluster_pb2.GetWorkerStatusRequest, context: Any
    ) -> cluster_pb2.GetWorkerStatusResponse:
        if request.worker_id != self.status.info.worker_id:
            raise NotFoundError(f"no worker {request.worker_id!r}; known: {self.status.info.worker_id}")
        return cluster_pb2.GetWorkerStatusResponse(status=self.status)

    async def ListTransfers(
        self, request: cluster_pb2.ClusterListTransfersRequest, context: Any
    ) -> cluster_pb2.ClusterListTransfersResponse:
        return self.transfers

    async def DrainWorker(
        self, request: cluster_pb2.DrainWorkerRequest, context: Any
    ) -> cluster_pb2.DrainWorkerResponse:
        self.drained.append(request.worker_id)
        return cluster_pb2.DrainWorkerResponse()


def _chunk(index: int, position: int, character: str) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        chunk=inference_pb2.GenerateChunk(
            index=index, first_token_index=position, token_ids=[ord(character)], text=character
        )
    )


def _complete(index: int, num_tokens: int) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        complete=inference_pb2.GenerateComplete(
            index=index,
            finish_reason=common_pb2.FINISH_REASON_STOP,
            matched_stop_str="!",
            usage=common_pb2.Usage(prompt_tokens=3, completion_tokens=num_tokens, cached_tokens=2),
            report=inference_pb2.RequestReport(decode_worker_id="w", ttft_s=0.25),
        )
    )


class EchoServer:
    """What a test needs to know of the server."""

    def __init__(self, grpc_server: GrpcServer, inference: EchoInference | None = None) -> None:
        self.grpc = grpc_server
        self.inference = inference or EchoInference()
        self.cluster = OneWorkerCluster()
        grpc_server.add(inference_pb2_grpc.add_InferenceServicer_to_server, self.inference, "pdmesh.v1.Inference")
        grpc_server.add(cluster_pb2_grpc.add_ClusterServicer_to_server, self.cluster, "pdmesh.v1.Cluster")

    @property
    def address(self) -> str:
        return self.grpc.address


@pytest_asyncio.fixture
async def echo() -> AsyncIterator[EchoServer]:
    server = EchoServer(GrpcServer("127.0.0.1", 0))
    try:
        await server.grpc.start()
        yield server
    finally:
        await server.grpc.stop()
