"""The engine in this process: EngineCore on a thread of its own, this class on the event loop's side.

    event loop                                    engine thread
    generate, reserve, aclose … ──▶ inbox ──▶     commands, between steps
                                                  schedule ──▶ what is due before the step ─┐
    streams, futures, listeners ◀── doorbell ◀─── run, update ──▶ what the step made ───────┘

The thread alone touches scheduler, model and the KV of blocks that no lease or stream owns; the loop alone touches
streams and futures.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from engine.api import (
    BlockEvents,
    BlockLease,
    BlockMemory,
    EngineRequest,
    EngineStatus,
    ImportedPrompt,
    OutputStream,
    PrefillStream,
    RankInfo,
)
from engine.assembly import Assembly, ModelLoader, assemble
from engine.config import EngineConfig
from engine.core import EngineCore, as_mesh_error
from engine.doorbell import Doorbell
from engine.engine_thread import Delivery, EngineThread
from engine.leases import Reservation
from engine.loader import load_model
from engine.parallel.exchange import GroupDownError
from engine.parallel.group import RankGroup
from engine.request import Request
from engine.scheduler import Scheduler
from engine.streams import EngineStream
from engine.validation import validate_request
from pdmesh.errors import MeshError, UnavailableError
from pdmesh.hashing import BlockHash
from pdmesh.types import KVNode, Load, ModelInfo, PairingFacts

# What a thread that waits for lost ranks is given to notice that the group was given up.
_DOWN_JOIN_S = 0.3
# A leader may notice in the middle of a step that a rank is gone before its supervisor says which one, and why.
_REASON_S = 0.25


class LocalEngine:
    """Implements Engine; see the module and engine/api.py.

    Args:
        load: Loads the model that `config` names.
        lend_kv: Whether other processes of this host may be lent the KV cache to read.
        group: Of ranks, which this process leads.
    """

    def __init__(
        self,
        config: EngineConfig,
        load: ModelLoader = load_model,
        *,
        lend_kv: bool = False,
        group: RankGroup | None = None,
    ) -> None:
        self._config = config
        self._group = group
        self._lend_kv = lend_kv
        self._load_model = load
        self._loop: asyncio.AbstractEventLoop | None = None
        # Rung by the thread.
        self._bell: Doorbell | None = None
        self._started: asyncio.Future[None] | None = None
        self._thread = EngineThread(self._build, self._on_thread_start, self._on_delivery, self._on_thread_end)
        self._assembly: Assembly | None = None
        self._ended_by: MeshError | None = None
        self._ended = asyncio.Event()
        self._on_progress: Callable[[int, int], None] = lambda done, total: None
        self._streams: dict[Request, EngineStream[Any]] = {}
        # Whatever is awaited in a method of this class, and those among them that wait for blocks.
        self._futures: set[asyncio.Future[None]] = set()
        self._grants: dict[Reservation, asyncio.Future[None]] = {}
        self._listeners: list[Callable[[BlockEvents], None]] = []

    # What it is

    @property
    def model(self) -> ModelInfo:
        return self._parts.model

    @property
    def facts(self) -> PairingFacts:
        return self._parts.facts

    @property
    def memory(self) -> BlockMemory:
        return self._parts.memory

    @property
    def kv_nodes(self) -> tuple[KVNode, ...]:
        return self._parts.kv_nodes

    @property
    def ranks(self) -> tuple[RankInfo, ...]:
        """Those that compute this engine's steps together; empty where it is alone."""
        return self._parts.ranks

    def load(self) -> Load:
        return self._thread.load

    def status(self) -> EngineStatus:
        return self._thread.status

    def keep_evicted(self, put: Callable[[BlockHash, memoryview], object]) -> None:
        memory = self._parts.memory

        def keep(evicted: list[tuple[int, BlockHash]]) -> None:
            memory.to_host([block_id for block_id, _ in evicted])
            for block_id, block_hash in evicted:
                put(block_hash, memory.view(block_id))

        self._parts.core.on_evicted = keep

    def subscribe_blocks(self, listener: Callable[[BlockEvents], None]) -> None:
        self._listeners.append(listener)

    @property
    def _parts(self) -> Assembly:
        assert self._assembly is not None, "start the engine first"
        return self._assembly

    # Its life

    async def start(self, on_progress: Callable[[int, int], None]) -> None:
        assert self._loop is None, "the engine was started before"
        self._loop = asyncio.get_running_loop()
        self._bell = Doorbell(self._loop)
        self._on_progress = on_progress
        with self._future() as started:
            self._started = started
            self._thread.start()
            await started

    async def close(self) -> None:
        self._thread.stop()
        if self._loop is not None:
            await self._joined()
        if self._group is not None:
            self._group.close()
        if self._bell is not None:
            self._bell.close()
            self._bell = None
        self._end(_closed_error())

    async def _joined(self) -> None:
        """Returns when the thread has ended; of a group that is down, it may wait for ranks that are gone."""
        timeout_s = _DOWN_JOIN_S if isinstance(self._ended_by, GroupDownError) else None
        await asyncio.to_thread(self._thread.join, timeout_s)

    def give_up(self, reason: str) -> None:
        assert self._group is not None
        self._group.give_up(reason)
        self._thread.stop()
        if self._loop is not None:
            # It may have gone.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._on_down, GroupDownError(reason))

    def _on_down(self, error: GroupDownError) -> None:
        if self._started is not None:
            _fail(self._started, error)
        self._end(error)

    async def wait_ended(self) -> MeshError:
        await self._ended.wait()
        assert self._ended_by is not None
        return self._ended_by

    def _end(self, error: MeshError) -> None:
        """Tells everybody who waits for something that it will not come."""
        self._ended_by = self._ended_by or error
        self._ended.set()
        for stream in self._streams.values():
            stream.end(error)
        self._streams.clear()
        for future in self._futures:
            _fail(future, error)

    def _check_running(self) -> None:
        assert self._assembly is not None, "start the engine first"
        if self._ended_by is not None or self._thread.stopping:
            raise self._ended_by or _closed_error()

    # Requests

    def validate(self, request: EngineRequest) -> None:
        model = self._parts.model
        validate_request(request, vocab_size=model.vocab_size, max_model_len=model.max_model_len)

    def generate(self, request: EngineRequest, imported: ImportedPrompt | None = None) -> OutputStream:
        if imported is None:
            return self._submit(request, hold_blocks=False, add=lambda scheduler, queued: scheduler.add(queued))
        try:
            return self._submit(
                request, hold_blocks=False, add=lambda scheduler, queued: scheduler.add_imported(queued, imported)
            )
        except MeshError:
            self._thread.post(lambda scheduler: scheduler.release(imported.lease))
            raise

    def prefill(self, request: EngineRequest) -> PrefillStream:
        return self._submit(request, hold_blocks=True, add=lambda scheduler, queued: scheduler.add(queued))

    def _submit(
        self, source: EngineRequest, *, hold_blocks: bool, add: Callable[[Scheduler, Request], None]
    ) -> EngineStream[Any]:
        self._check_running()
        self.validate(source)
        request = Request(source, hold_blocks=hold_blocks)
        stream: EngineStream[Any] = EngineStream(lambda: self._close_stream(request))
        self._streams[request] = stream
        self._thread.post(lambda scheduler: add(scheduler, request))
        return stream

    def _close_stream(self, request: Request) -> None:
        # A held request outlives its last output; any other is over with it.
        if self._streams.pop(request, None) is not None or request.hold_blocks:
            self._thread.post(lambda scheduler: scheduler.abort(request))

    # Leases

    async def acquire_prefix(self, token_ids: Sequence[int], cache_salt: bytes) -> BlockLease:
        return await self._acquire(lambda scheduler, lease: scheduler.acquire_prefix(lease, token_ids, cache_salt))

    async def acquire_blocks(self, hashes: Sequence[BlockHash]) -> BlockLease:
        return await self._acquire(lambda scheduler, lease: scheduler.acquire_blocks(lease, hashes))

    async def _acquire(self, fill: Callable[[Scheduler, BlockLease], None]) -> BlockLease:
        self._check_running()
        lease = BlockLease()
        with self._future() as acquired:

            def acquire(scheduler: Scheduler) -> None:
                try:
                    fill(scheduler, lease)
                except (OverflowError, TypeError, ValueError) as error:
                    # Token ids that cannot be hashed; nothing was changed yet.
                    self._tell(_fail, acquired, as_mesh_error(error))
                else:
                    self._tell(_resolve, acquired)

            self._thread.post(acquire)
            try:
                await acquired
            except BaseException:
                # It comes after `acquire` in the inbox, so it finds whatever that has leased.
                self._thread.post(lambda scheduler: scheduler.release(lease))
                raise
        return lease

    async def commit(self, lease: BlockLease, first: int, hashes: Sequence[BlockHash]) -> None:
        # The thread takes commands in order: whatever is asked of it after this finds the blocks.
        self._thread.post(lambda scheduler: scheduler.commit(lease, first, hashes))

    async def reserve(self, lease: BlockLease, num_blocks: int) -> None:
        self._check_running()
        reservation = Reservation(lease, num_blocks)
        with self._future() as granted:

            def reserve(scheduler: Scheduler) -> None:
                try:
                    scheduler.reserve(reservation)
                except MeshError as error:
                    self._tell(_fail, granted, error)

            self._grants[reservation] = granted
            self._thread.post(reserve)
            try:
                await granted
            except BaseException:
                # Also where the grant is on its way: then the blocks are taken back.
                self._thread.post(lambda scheduler: scheduler.cancel_reservation(reservation))
                raise
            finally:
                del self._grants[reservation]

    async def release(self, lease: BlockLease) -> None:
        self._thread.post(lambda scheduler: scheduler.release(lease))

    # From the thread

    def _build(self) -> EngineCore:
        self._assembly = assemble(
            self._config, self._load_model, self._report_progress, lend_kv=self._lend_kv, group=self._group
        )
        return self._assembly.core

    def _on_thread_start(self) -> None:
        assert self._started is not None
        self._tell(_resolve, self._started)

    def _report_progress(self, done: int, total: int) -> None:
        if self._thread.stopping:
            raise _closed_error()
        self._tell(self._on_progress, done, total)

    def _on_delivery(self, delivery: Delivery) -> None:
        self._tell(self._deliver, delivery)

    def _on_thread_end(self, error: Exception | None) -> None:
        if error is not None:
            ended_by = as_mesh_error(error)
            if self._group is not None:
                # The others may wait for this rank in the middle of a step.
                self._group.give_up(ended_by.message)
            self._tell(self._end, ended_by)

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        assert self._bell is not None
        self._bell.call(partial(callback, *args))

    def _deliver(self, delivery: Delivery) -> None:
        for output in delivery.outputs:
            stream = self._streams.get(output.request)
            if stream is None:
                continue
            if isinstance(output.event, MeshError):
                stream.end(output.event)
            else:
                stream.put(output.event)
            if output.last:
                stream.end()
                del self._streams[output.request]
        for reservation in delivery.granted:
            if reservation in self._grants:
                _resolve(self._grants[reservation])
        if delivery.block_events.stored or delivery.block_events.removed:
            for listener in self._listeners:
                listener(delivery.block_events)

    @contextlib.contextmanager
    def _future(self) -> Iterator[asyncio.Future[None]]:
        """A future that fails if the engine ends first."""
        assert self._loop is not None
        future: asyncio.Future[None] = self._loop.create_future()
        self._futures.add(future)
        try:
            yield future
        finally:
            self._futures.remove(future)


def _closed_error() -> UnavailableError:
    return UnavailableError("the engine was closed: take another worker", reason="ENGINE_CLOSED")


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
