"""Values that services exchange, free of wire types: `from_pb` and `to_pb` at the edges turn one into the other."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum

from pdmesh.v1 import common_pb2 as pb

PROTOCOL_VERSION = 1


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    STORE = "store"


class WorkerState(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


_ROLES = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE, Role.STORE: pb.ROLE_STORE}
_STATES = {
    WorkerState.LOADING: pb.WORKER_STATE_LOADING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
}
_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_ROLES_BACK = {v: k for k, v in _ROLES.items()}
_STATES_BACK = {v: k for k, v in _STATES.items()}
_FINISH_REASONS_BACK = {v: k for k, v in _FINISH_REASONS.items()}


def role_to_pb(role: Role) -> pb.Role.ValueType:
    return _ROLES[role]


def role_from_pb(role: pb.Role.ValueType) -> Role:
    """Raises KeyError for a role that this version does not know."""
    return _ROLES_BACK[role]


def finish_reason_to_pb(reason: FinishReason) -> pb.FinishReason.ValueType:
    return _FINISH_REASONS[reason]


def finish_reason_from_pb(reason: pb.FinishReason.ValueType) -> FinishReason:
    return _FINISH_REASONS_BACK[reason]


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file that is nothing but memory (memfd), in which KV block i begins at i times a block's bytes.

    Sealed against shrinking before others read it. `descriptor` is open as long as the memory is in use.
    """

    descriptor: int
    num_bytes: int


@dataclass(frozen=True, slots=True, order=True)
class BlockRun:
    """Consecutive bytes of a KV block."""

    offset_bytes: int
    num_bytes: int

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.num_bytes


@dataclass(frozen=True, slots=True)
class KVNode:
    """Where some of each KV block's bytes lie: a worker's ranks may be spread over several machines.

    Attributes:
        runs: Which bytes; ascending, apart from each other.
        address: host:port at which the service KVNode moves them; empty: they lie in the process that says so.
        token: Secret that this service asks for.
        offers: Names and addresses of the transports on which it receives, best first.
    """

    runs: tuple[BlockRun, ...]
    address: str = ""
    token: str = ""
    offers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the likeliest ones at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_pb(cls, message: pb.TokenLogprob) -> TokenLogprob:
        top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
        return cls(message.token_id, message.logprob, top)

    def to_pb(self) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token_id=self.token_id,
            logprob=self.logprob,
            top_token_ids=[token_id for token_id, _ in self.top],
            top_logprobs=[logprob for _, logprob in self.top],
        )


@dataclass(frozen=True, slots=True)
class PairingFacts:
    """What two workers must have in common for KV to pass between them."""

    model_digest: str
    dtype: str
    kv_dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_layout: str
    quantization: str = "none"
    protocol_version: int = PROTOCOL_VERSION

    def mismatch(self, other: PairingFacts) -> str:
        """What differs, for a person ("dtype: float32 here, bfloat16 there"); empty if KV may pass."""
        differing = []
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(other, f.name)
            if ours != theirs:
                differing.append(f"{f.name}: {ours} here, {theirs} there")
        return "; ".join(differing)

    @classmethod
    def from_pb(cls, message: pb.PairingFacts) -> PairingFacts:
        return cls(**{f.name: getattr(message, f.name) for f in fields(cls)})

    def to_pb(self) -> pb.PairingFacts:
        return pb.PairingFacts(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as those see it who send it prompts. `max_model_len` counts prompt and output tokens together."""

    name: str
    architecture: str
    vocab_size: int
    max_model_len: int

    @classmethod
    def from_pb(cls, message: pb.ModelInfo) -> ModelInfo:
        return cls(message.name, message.architecture, message.vocab_size, message.max_model_len)

    def to_pb(self) -> pb.ModelInfo:
        return pb.ModelInfo(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is; see common.proto."""

    num_running: int = 0
    num_waiting: int = 0
    num_queued_tokens: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_host_blocks: int = 0
    num_disk_blocks: int = 0

    @classmethod
    def from_pb(cls, message: pb.Load) -> Load:
        return cls(**{f.name: getattr(message, f.name) for f in fields(cls)})

    def to_pb(self) -> pb.Load:
        return pb.Load(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as the directory knows it. `facts` and `model` are None while it loads.

    `kv_transports` names the transports over which its KV travels, separated by commas.
    """

    worker_id: str
    incarnation: str
    role: Role
    state: WorkerState
    address: str
    facts: PairingFacts | None = None
    model: ModelInfo | None = None
    load: Load = Load()
    loaded_bytes: int = 0
    total_bytes: int = 0
    kv_transports: str = ""
    tp_size: int = 1
    pp_size: int = 1

    def updated(self, *, state: WorkerState | None = None, load: Load | None = None) -> WorkerInfo:
        return replace(self, state=state or self.state, load=load or self.load)

    @classmethod
    def from_pb(cls, message: pb.WorkerInfo) -> WorkerInfo:
        """Raises KeyError where role or state is one that this version does not know."""
        return cls(
            worker_id=message.worker_id,
            incarnation=message.incarnation,
            role=role_from_pb(message.role),
            state=_STATES_BACK[message.state],
            address=message.address,
            facts=PairingFacts.from_pb(message.facts) if message.HasField("facts") else None,
            model=ModelInfo.from_pb(message.model) if message.HasField("model") else None,
            load=Load.from_pb(message.load),
            loaded_bytes=message.loaded_bytes,
            total_bytes=message.total_bytes,
            kv_transports=message.kv_transports,
            # Of stores, and of workers of a version that knew no ranks, 0.
            tp_size=message.tp_size or 1,
            pp_size=message.pp_size or 1,
        )

    def to_pb(self) -> pb.WorkerInfo:
        return pb.WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=role_to_pb(self.role),
            state=_STATES[self.state],
            address=self.address,
            facts=self.facts.to_pb() if self.facts else None,
            model=self.model.to_pb() if self.model else None,
            load=self.load.to_pb(),
            loaded_bytes=self.loaded_bytes,
            total_bytes=self.total_bytes,
            kv_transports=self.kv_transports,
            tp_size=self.tp_size,
            pp_size=self.pp_size,
        )


@dataclass(frozen=True, slots=True)
class KVSource:
    """Somebody who has the KV of a prompt's first `num_blocks` blocks, or had it a moment ago; see common.proto."""

    worker_id: str
    incarnation: str
    address: str
    num_blocks: int

    @classmethod
    def from_pb(cls, message: pb.KVSource) -> KVSource:
        return cls(message.worker_id, message.incarnation, message.address, message.num_blocks)

    def to_pb(self) -> pb.KVSource:
        return pb.KVSource(**{f.name: getattr(self, f.name) for f in fields(self)})
