"""`pdmesh.v1.Cluster` on the wire: the workers as this router sees them, for operators."""

import asyncio
import contextlib
from collections.abc import Iterator

import grpc

from pdmesh import status
from pdmesh.channels import ChannelPool
from pdmesh.errors import NotFoundError, UnavailableError
from pdmesh.types import WorkerInfo, role_to_pb
from pdmesh.v1 import cluster_pb2 as pb
from pdmesh.v1 import cluster_pb2_grpc
from router.registry import WorkerRegistry

_WORKER_TIMEOUT_S = 5.0
# Well below the time that a client gives the whole call.
_TRANSFERS_TIMEOUT_S = 2.0


class ClusterServicer(cluster_pb2_grpc.ClusterServicer):
    """See the module. Closes neither argument."""

    def __init__(self, registry: WorkerRegistry, channels: ChannelPool) -> None:
        self._registry = registry
        self._channels = channels

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: object) -> pb.ListWorkersResponse:
        return pb.ListWorkersResponse(
            workers=[
                pb.WorkerView(
                    info=record.info.to_pb(),
                    age_s=record.age_s,
                    num_assigned=record.num_assigned,
                    excluded_because=record.excluded_because,
                )
                for record in self._registry.records()
            ]
        )

    async def ListTransfers(
        self, request: pb.ClusterListTransfersRequest, context: object
    ) -> pb.ClusterListTransfersResponse:
        workers = [record.info for record in self._registry.records()]
        return pb.ClusterListTransfersResponse(workers=await asyncio.gather(*map(self._transfers_of, workers)))

    async def _transfers_of(self, info: WorkerInfo) -> pb.WorkerTransfers:
        """What this worker answers, or why it does not; raises nothing and takes _TRANSFERS_TIMEOUT_S at most."""
        answer = pb.WorkerTransfers(worker_id=info.worker_id, role=role_to_pb(info.role), address=info.address)
        worker = cluster_pb2_grpc.WorkerStub(self._channels.get(info.address))
        try:
            response = await worker.ListTransfers(pb.WorkerListTransfersRequest(), timeout=_TRANSFERS_TIMEOUT_S)
            answer.report.CopyFrom(response.report)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                answer.error = f"nothing came within {_TRANSFERS_TIMEOUT_S:g} s"
            else:
                answer.error = status.from_rpc_error(error).message or error.code().name
        return answer

    async def GetWorkerStatus(self, request: pb.GetWorkerStatusRequest, context: object) -> pb.GetWorkerStatusResponse:
        info = self._info(request.worker_id)
        worker = cluster_pb2_grpc.WorkerStub(self._channels.get(info.address))
        with _names_who_is_out_of_reach(info):
            answer = await worker.GetStatus(pb.GetStatusRequest(), timeout=_WORKER_TIMEOUT_S)
        return pb.GetWorkerStatusResponse(status=answer)

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: object) -> pb.DrainWorkerResponse:
        info = self._info(request.worker_id)
        worker = cluster_pb2_grpc.WorkerStub(self._channels.get(info.address))
        with _names_who_is_out_of_reach(info):
            await worker.Drain(pb.DrainRequest(), timeout=_WORKER_TIMEOUT_S)
        return pb.DrainWorkerResponse()

    def _info(self, worker_id: str) -> WorkerInfo:
        """Raises NotFoundError, which names those that are known."""
        info = self._registry.info(worker_id)
        if info is None:
            known = ", ".join(record.info.worker_id for record in self._registry.records()) or "none"
            raise NotFoundError(
                f"no worker {worker_id[:128]!r}; known: {known}", reason="WORKER_NOT_FOUND", stage="admission"
            )
        return info


@contextlib.contextmanager
def _names_who_is_out_of_reach(info: WorkerInfo) -> Iterator[None]:
    """Turns what a call to this worker fails with into our errors."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        failure = status.from_rpc_error(error)
        if isinstance(failure, UnavailableError) and not status.is_ours(error):
            raise UnavailableError(
                f"{info.worker_id} does not answer at {info.address}: {failure.message}",
                reason="WORKER_UNREACHABLE",
                stage="admission",
            ) from error
        raise failure from error
