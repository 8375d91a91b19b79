"""One attempt to have a prompt computed by a prefill worker.

    decode                                     prefill
      │ ── RunStart ───────────────────────────▶ │  queues; no memory is held here meanwhile
      │ ◀─────────────────────────── RunStarted ─│  computes
      │ reserves blocks, issues a ticket         │
      │ ── TransferGrant ──────────────────────▶ │
      │ ◀──────────────────────────── FirstToken │  passed on to the client at once
      │ ◀═══════ parts, over the transport ═════ │
      │ ◀────────────────────────── RunComplete ─│
      │ every byte verified: blocks can commit   │

Whatever goes wrong raises; `run` returns only when the lease holds the whole prompt. Blocks that were reserved stay in
the lease for the next attempt, and no writer can reach them any more once `run` has ended.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from engine.api import BlockLease, Engine, EngineRequest
from kvstore.transfer.base import Grant
from kvstore.transfer.receiver import ReceiverHub
from pdmesh import status
from pdmesh.channels import ChannelPool
from pdmesh.errors import UnavailableError
from pdmesh.types import KVSource, TokenLogprob
from pdmesh.v1 import prefill_pb2 as pb
from pdmesh.v1 import prefill_pb2_grpc
from worker.host import WorkerHost


@dataclass(frozen=True, slots=True)
class PrefillTarget:
    """A prefill worker that may be asked, and who else has more of the prompt's KV than it, best first."""

    worker_id: str
    incarnation: str
    address: str
    sources: tuple[KVSource, ...] = ()


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token after the prompt, as the prefill worker sampled it."""

    token_id: int
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A prefill worker that failed a request; `unreachable` where nobody is there."""

    target: PrefillTarget
    unreachable: bool


@dataclass(slots=True)
class Report:
    """How a prompt's KV came here; filled in as it is learned. Durations in seconds."""

    worker_id: str = ""
    transport: str = ""
    kv_bytes: int = 0
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    transfer_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)


class Handoff:
    """What every hand-off of this worker needs; `run` makes one.

    Args:
        host: This worker.
        engine: Reserves the blocks.
        hub: Receives the KV.
        channels: To prefill workers.
    """

    def __init__(self, host: WorkerHost, engine: Engine, hub: ReceiverHub, channels: ChannelPool) -> None:
        self._host = host
        self._engine = engine
        self._hub = hub
        self._channels = channels

    async def run(
        self,
        target: PrefillTarget,
        request: EngineRequest,
        request_id: str,
        epoch: int,
        lease: BlockLease,
        report: Report,
        on_first_token: Callable[[FirstToken], bool],
    ) -> bool:
        """Fills `lease` with the KV of the request's prompt and earlier outputs.

        Args:
            target: Whom to ask.
            request: What to compute.
            request_id: The router's id of it.
            epoch: Larger than that of any earlier attempt.
            lease: Holds the cached prefix; gains blocks.
            report: Gains what is learned.
            on_first_token: Called as soon as the token is here, most often before the KV is. Returns whether the KV
                is still needed.

        Returns whether `lease` holds the prompt; False only where `on_first_token` returned False.
        Raises MeshError: what the prefill worker or the transfer failed with.
        """
        report.worker_id = target.worker_id
        stub = prefill_pb2_grpc.PrefillStub(self._channels.get(target.address))
        call = stub.Run()
        try:
            # A failure of either side of the group ends the other: nobody waits for a grant that will not come.
            async with asyncio.TaskGroup() as group:
                await call.write(pb.RunRequest(start=self._start(target, request, request_id, epoch, lease)))
                async for response in call:
                    match response.WhichOneof("event"):
                        case "started":
                            started = response.started
                            report.queue_s, report.transport = started.queue_s, started.transport
                            report.num_cached_tokens = started.num_cached_tokens
                            group.create_task(self._receive(call, target, request, request_id, epoch, lease, report))
                        case "first_token":
                            report.compute_s = response.first_token.compute_s
                            if not on_first_token(_first_token(response.first_token)):
                                raise _KVNotNeeded
                        case "complete":
                            report.transfer_s = response.complete.transfer_s
            return True
        except BaseExceptionGroup as failed:
            cause = _cause(failed)
            if isinstance(cause, _KVNotNeeded):
                return False
            raise cause from failed
        finally:
            call.cancel()

    async def _receive(
        self,
        call: grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse],
        target: PrefillTarget,
        request: EngineRequest,
        request_id: str,
        epoch: int,
        lease: BlockLease,
        report: Report,
    ) -> None:
        """Reserves blocks, grants them, and returns when every byte of them is verified."""
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        num_blocks = -(-num_tokens // self._engine.facts.block_size)
        if len(lease.block_ids) < num_blocks:
            await self._engine.reserve(lease, num_blocks - len(lease.block_ids))
        block_ids = lease.block_ids[lease.num_cached_blocks :]
        incoming = self._hub.expect(request_id, epoch, target.incarnation, block_ids, report.transport)
        try:
            try:
                await call.write(pb.RunRequest(grant=_grant_to_pb(incoming.grant)))
                await call.done_writing()
            except asyncio.InvalidStateError as error:
                raise UnavailableError(f"{target.worker_id} ended before its grant", stage="prefill") from error
            stats = await incoming.wait()
            report.kv_bytes = stats.num_bytes
            self._engine.memory.to_device(block_ids)
        finally:
            await incoming.aclose()

    def _start(
        self, target: PrefillTarget, request: EngineRequest, request_id: str, epoch: int, lease: BlockLease
    ) -> pb.RunStart:
        return pb.RunStart(
            request_id=request_id,
            attempt=epoch,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=request.output_token_ids,
            sampling_params=request.sampling.to_pb(),
            priority=request.priority,
            cache_salt=request.cache_salt,
            num_held_blocks=lease.num_cached_blocks,
            decode_worker_id=self._host.worker_id,
            decode_incarnation=self._host.incarnation,
            expected_incarnation=target.incarnation,
            facts=self._engine.facts.to_pb(),
            transports=self._hub.transports,
            completion_index=request.completion_index,
            sources=[source.to_pb() for source in target.sources],
        )


class _KVNotNeeded(Exception):
    """The first token was the last: what remains of the hand-off can stop."""


def _cause(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """What failed first, as our error where a peer's status said it."""
    cause = failed.exceptions[0]
    return status.from_rpc_error(cause, stage="prefill") if isinstance(cause, grpc.aio.AioRpcError) else cause


def _first_token(message: pb.FirstToken) -> FirstToken:
    logprobs: Sequence[TokenLogprob] = [TokenLogprob.from_pb(message.logprob)] if message.HasField("logprob") else []
    return FirstToken(
        message.token_id, tuple(logprobs), tuple(TokenLogprob.from_pb(entry) for entry in message.prompt_logprobs)
    )


def _grant_to_pb(grant: Grant) -> pb.TransferGrant:
    return pb.TransferGrant(ticket=grant.ticket, epoch=grant.epoch, transport=grant.transport, address=grant.address)
