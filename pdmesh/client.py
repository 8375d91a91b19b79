"""The client for programs without an event loop.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The capital of France is", max_tokens=8, temperature=0).text)
        for event in client.stream(messages=[{"role": "user", "content": "Hello"}]):
            ...

Every failure is raised as an error of `pdmesh.errors`. Safe to share between threads.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Self, Unpack

import grpc

from pdmesh.channels import CHANNEL_OPTIONS
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


class Client:
    """Speaks to one router, over one connection made at first use. Close it, or use it in `with`."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call and the connection."""
        self._channel.close()

    def generate(
        self, text: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationResult:
        """Generates and returns the whole answer; see GenerateOptions for what it takes."""
        collector = EventCollector()
        for event in self.stream(text, timeout_s=timeout_s, **options):
            collector.add(event)
        return collector.result()

    def stream(
        self, text: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """Generates, event by event. Leaving the loop early, or `close()` on the iterator, cancels the work.

        The request starts when the first event is asked for, and its `timeout_s` with it.
        """
        return self._events(generate_request(text, options), timeout_s)

    def _events(self, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> Generator[Event, None, None]:
        with mesh_errors(self.address):
            call = self._inference.Generate(request, timeout=timeout_s)
            try:
                for message in call:
                    event = event_from_pb(message)
                    if event is not None:
                        yield event
            finally:
                call.cancel()

    def tokenize(
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
            return tuple(self._inference.Tokenize(request, timeout=timeout_s).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "", timeout_s: float = CONTROL_TIMEOUT_S) -> str:
        request = detokenize_request(token_ids, model)
        with mesh_errors(self.address):
            return self._inference.Detokenize(request, timeout=timeout_s).text

    def models(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models that live workers serve."""
        with mesh_errors(self.address):
            response = self._inference.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout_s)
            return tuple(map(ModelInfo.from_pb, response.models))

    def server_info(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> ServerInfo:
        with mesh_errors(self.address):
            request = inference_pb2.GetServerInfoRequest()
            return ServerInfo.from_pb(self._inference.GetServerInfo(request, timeout=timeout_s))

    def workers(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[WorkerView, ...]:
        """Every worker that the router knows."""
        with mesh_errors(self.address):
            response = self._cluster.ListWorkers(cluster_pb2.ListWorkersRequest(), timeout=timeout_s)
            return tuple(map(WorkerView.from_pb, response.workers))

    def worker_status(self, worker_id: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> WorkerStatus:
        """What one worker says that it holds, and the ranks that it computes with."""
        with mesh_errors(self.address):
            request = cluster_pb2.GetWorkerStatusRequest(worker_id=worker_id)
            response = self._cluster.GetWorkerStatus(request, timeout=timeout_s)
            return WorkerStatus.from_pb(response.status)

    def transfers(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[WorkerTransfers, ...]:
        """What each worker that the router knows says of its KV transfers, or why it does not answer."""
        with mesh_errors(self.address):
            response = self._cluster.ListTransfers(cluster_pb2.ClusterListTransfersRequest(), timeout=timeout_s)
            return tuple(map(WorkerTransfers.from_pb, response.workers))

    def drain(self, worker_id: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Asks a worker to finish what it has, take nothing new, and leave."""
        with mesh_errors(self.address):
            self._cluster.DrainWorker(cluster_pb2.DrainWorkerRequest(worker_id=worker_id), timeout=timeout_s)
