"""`pdmesh.v1.Cluster` on the wire: the workers as this router sees them, for operators."""

import grpc

from pdmesh import status
from pdmesh.channels import ChannelPool
from pdmesh.errors import NotFoundError
from pdmesh.v1 import cluster_pb2 as pb
from pdmesh.v1 import cluster_pb2_grpc
from router.registry import WorkerRegistry

_DRAIN_TIMEOUT_S = 5.0


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

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: object) -> pb.DrainWorkerResponse:
        info = self._registry.info(request.worker_id)
        if info is None:
            known = ", ".join(record.info.worker_id for record in self._registry.records()) or "none"
            raise NotFoundError(
                f"no worker {request.worker_id[:128]!r}; known: {known}", reason="WORKER_NOT_FOUND", stage="admission"
            )
        worker = cluster_pb2_grpc.WorkerStub(self._channels.get(info.address))
        try:
            await worker.Drain(pb.DrainRequest(), timeout=_DRAIN_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error
        return pb.DrainWorkerResponse()
