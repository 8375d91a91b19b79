"""One attempt to have a prompt computed by a prefill worker.

    decode                                     prefill
      │ ── RunStart ───────────────────────────▶ │  queues; no memory is held here meanwhile
      │ ◀─────────────────────────── RunStarted ─│  computes; says over which transports it reaches us
      │ reserves blocks, issues a ticket         │
      │ ── TransferGrant ──────────────────────▶ │
      │ ◀──────────────────────────── FirstToken │  passed on to the client at once
      │ ◀═══════ parts, over the transport ═════ │
      │ every byte verified: blocks can commit   │
      │ ◀────────────────────────── RunComplete ─│  nobody waits for it

A transfer that fails is tried again over the next transport, with a new ticket for the same blocks. Heartbeats in both
directions are the lease on each other's blocks.

Whatever goes wrong raises; `run` returns only when the lease holds the whole prompt. Blocks that were reserved stay in
the lease for the next attempt, and no writer can reach them any more once `run` has ended.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.api import BlockLease, Engine, EngineRequest
from kvstore.nodes.arrival import Arrival, ReceivingNodes
from kvstore.nodes.flows import Flow
from kvstore.nodes.messages import flows_from_pb, receivers_to_pb
from kvstore.transfer.base import Grant
from kvstore.transfer.messages import grant_to_pb
from kvstore.transfer.receipt import Expected
from kvstore.transfer.streams import ClientStream
from pdmesh.channels import ChannelPool
from pdmesh.hashing import root_hash, sequence_hashes
from pdmesh.types import KVSource, TokenLogprob
from pdmesh.v1 import kv_transfer_pb2 as kv_pb
from pdmesh.v1 import prefill_pb2 as pb
from pdmesh.v1 import prefill_pb2_grpc
from worker.host import WorkerHost

_RunStream = ClientStream[pb.RunRequest, pb.RunResponse]


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
        nodes: Receive the KV.
        channels: To prefill workers.
    """

    def __init__(self, host: WorkerHost, engine: Engine, nodes: ReceivingNodes, channels: ChannelPool) -> None:
        self._host = host
        self._engine = engine
        self._nodes = nodes
        self._channels = channels
        # Streams of which nothing is wanted any more, on their way to a good end.
        self._ending: set[asyncio.Task[bool]] = set()

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
        stream: _RunStream = ClientStream(
            stub.Run(), target.worker_id, pb.RunRequest(heartbeat=kv_pb.Heartbeat()), stage="prefill"
        )
        arriving = _Arriving(Arrival(self._nodes))
        try:
            # A failure of either side of the group ends the other: nobody waits for a grant that will not come.
            async with asyncio.TaskGroup() as group:
                await stream.write(pb.RunRequest(start=self._start(target, request, request_id, epoch, lease)))
                beating = group.create_task(stream.beat())
                reading = group.create_task(self._read(stream, arriving, report, on_first_token))
                await arriving.flows
                await self._receive(stream, arriving, target, request, request_id, epoch, lease, report)
                await arriving.first_token.wait()
                reading.cancel()
                beating.cancel()
        except BaseExceptionGroup as failed:
            await stream.aclose()
            if isinstance(failed.exceptions[0], _KVNotNeeded):
                return False
            raise failed.exceptions[0] from failed
        except BaseException:
            await stream.aclose()
            raise
        ending = asyncio.create_task(stream.end())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return True

    async def aclose(self) -> None:
        """Waits for streams that are about to end; call it when no hand-off runs."""
        if self._ending:
            await asyncio.wait(self._ending)

    async def _read(
        self, stream: "_RunStream", arriving: "_Arriving", report: Report, on_first_token: Callable[[FirstToken], bool]
    ) -> None:
        """Passes on what the prefill worker says."""
        async for response in stream.responses():
            arriving.arrival.alive()
            match response.WhichOneof("event"):
                case "started":
                    started = response.started
                    report.queue_s, report.num_cached_tokens = started.queue_s, started.num_cached_tokens
                    flows = flows_from_pb(started.flows)
                    for flow in flows:
                        report.transport = flow.transports[0] if flow.transports else ""
                        reasons = "; ".join(f"{name}: {reason}" for name, reason in flow.unusable)
                        self._host.journal.note_choice(
                            report.worker_id, report.transport, reasons or "the best on offer"
                        )
                    arriving.flows.set_result(flows)
                case "first_token":
                    report.compute_s = response.first_token.compute_s
                    if not on_first_token(_first_token(response.first_token)):
                        raise _KVNotNeeded
                    arriving.first_token.set()
                case "transfer_failed":
                    failed = response.transfer_failed
                    arriving.arrival.failed(failed.flow, failed.grant_number, failed.reason, failed.message)
                case "complete":
                    # All is verified, and whoever waits for that is about to learn it.
                    return

    async def _receive(
        self,
        stream: "_RunStream",
        arriving: "_Arriving",
        target: PrefillTarget,
        request: EngineRequest,
        request_id: str,
        epoch: int,
        lease: BlockLease,
        report: Report,
    ) -> None:
        """Reserves blocks, grants them, and returns when every byte of them is verified."""
        token_ids = request.prompt_token_ids + request.output_token_ids
        hashes = sequence_hashes(token_ids, self._engine.facts.block_size, root_hash(request.cache_salt))
        if len(lease.block_ids) < len(hashes):
            await self._engine.reserve(lease, len(hashes) - len(lease.block_ids))
        block_ids = lease.block_ids[lease.num_cached_blocks :]
        expected = Expected(
            request_id, epoch, target.worker_id, target.incarnation, block_ids, hashes[lease.num_cached_blocks :]
        )

        async def grant(flow: int, number: int, grant: Grant) -> None:
            report.transport = grant.transport
            await stream.write(pb.RunRequest(grant=grant_to_pb(number, grant, flow)))

        stats = await arriving.arrival.run(expected, await arriving.flows, grant)
        report.kv_bytes, report.transfer_s = stats.num_bytes, stats.duration_s
        self._engine.memory.to_device(block_ids)

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
            receivers=receivers_to_pb(self._nodes.receivers),
            completion_index=request.completion_index,
            sources=[source.to_pb() for source in target.sources],
        )


class _Arriving:
    """What one hand-off waits for.

    Attributes:
        arrival: The KV.
        flows: By which it comes, once the prefill worker has started.
        first_token: Set once that was passed on.
    """

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.flows: asyncio.Future[tuple[Flow, ...]] = asyncio.get_running_loop().create_future()
        self.first_token = asyncio.Event()


class _KVNotNeeded(Exception):
    """The first token was the last: what remains of the hand-off can stop."""


def _first_token(message: pb.FirstToken) -> FirstToken:
    logprobs: Sequence[TokenLogprob] = [TokenLogprob.from_pb(message.logprob)] if message.HasField("logprob") else []
    return FirstToken(
        message.token_id, tuple(logprobs), tuple(TokenLogprob.from_pb(entry) for entry in message.prompt_logprobs)
    )
