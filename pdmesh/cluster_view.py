"""A cluster as one of its routers sees it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pdmesh.types import WorkerInfo
from pdmesh.v1 import cluster_pb2, inference_pb2


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker, seconds since its last sign of life, and why no request goes there (empty if requests do)."""

    info: WorkerInfo
    age_s: float
    num_assigned: int
    excluded_because: str

    @classmethod
    def from_pb(cls, message: cluster_pb2.WorkerView) -> WorkerView:
        """Raises KeyError where role or state is one that this version does not know."""
        return cls(WorkerInfo.from_pb(message.info), message.age_s, message.num_assigned, message.excluded_because)


@dataclass(frozen=True, slots=True)
class RankStatus:
    """A process that computes for a worker: bytes of its shard of the model and of its part of the KV cache."""

    rank: int
    host: str
    pid: int
    weight_bytes: int
    kv_bytes: int

    @classmethod
    def from_pb(cls, message: cluster_pb2.RankStatus) -> RankStatus:
        return cls(**{f.name: getattr(message, f.name) for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker says that it holds; see cluster.proto. `ranks` is empty where one process is all of it."""

    info: WorkerInfo
    num_requests: int
    num_leases: int
    num_tickets: int
    num_request_tasks: int
    num_cached_blocks: int
    uptime_s: float
    num_steps: int
    ranks: tuple[RankStatus, ...]

    @classmethod
    def from_pb(cls, message: cluster_pb2.GetStatusResponse) -> WorkerStatus:
        """Raises KeyError where role or state is one that this version does not know."""
        return cls(
            info=WorkerInfo.from_pb(message.info),
            num_requests=message.num_requests,
            num_leases=message.num_leases,
            num_tickets=message.num_tickets,
            num_request_tasks=message.num_request_tasks,
            num_cached_blocks=message.num_cached_blocks,
            uptime_s=message.uptime_s,
            num_steps=message.num_steps,
            ranks=tuple(map(RankStatus.from_pb, message.ranks)),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for at most."""

    max_text_bytes: int
    max_messages: int
    max_n: int
    max_logprobs: int
    max_stop_strings: int
    max_stop_string_bytes: int
    max_logit_bias: int

    @classmethod
    def from_pb(cls, message: inference_pb2.Limits) -> Limits:
        return cls(**{f.name: getattr(message, f.name) for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A router: version, age, how many requests it has and may have, and what one may ask for."""

    version: str
    uptime_s: float
    num_active_requests: int
    max_active_requests: int
    limits: Limits

    @classmethod
    def from_pb(cls, message: inference_pb2.GetServerInfoResponse) -> ServerInfo:
        return cls(
            version=message.version,
            uptime_s=message.uptime_s,
            num_active_requests=message.num_active_requests,
            max_active_requests=message.max_active_requests,
            limits=Limits.from_pb(message.limits),
        )
