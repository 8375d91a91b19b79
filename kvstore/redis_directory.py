"""The directory on Redis or Valkey; the only module that imports redis.

Keys, all prefixed `pdmesh:{cluster}:`, all but the first expiring by themselves:

    workers                          set of worker_ids that may have a registration
    worker:ID                        serialized pdmesh.v1.WorkerInfo; without role and state: this incarnation left
    events:ID:INCARNATION            stream; entry id SEQ-0, fields "p", "h" and "d": hashes of blocks that lie in the
                                     pool, in host memory, on disk now; "r": hashes of blocks that are gone
    snapshot:ID:INCARNATION          hash; field "seq", in decimal, and fields "p", "h" and "d": hashes of all blocks

Hashes are packed, 16 bytes each, end to end. Each stands in one field, that of the nearest tier; all fields are there,
empty or not.

Plain commands only: no scripts (so that an ACL may forbid them) and nothing newer than Redis 6.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError, WatchError

from kvstore.directory import (
    DEPARTURE_TTL_S,
    MAX_EVENTS,
    MAX_EVENTS_PER_READ,
    TTL_S,
    BlockEvent,
    BlockSnapshot,
    DirectoryUnavailableError,
    Registration,
    TieredBlocks,
    WorkerRef,
)
from kvstore.tiers.base import Tier
from pdmesh.errors import ConfigError
from pdmesh.hashing import HASH_BYTES, BlockHash
from pdmesh.types import WorkerInfo
from pdmesh.v1 import common_pb2 as pb

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 0.5
# Of one call of the directory, which may take a few round trips.
CALL_TIMEOUT_S = 1.0
HEALTH_CHECK_INTERVAL_S = 5
# Each is logged once; past this many, none.
MAX_LOGGED_KEYS = 1000

_TIER_FIELDS = {Tier.POOL: b"p", Tier.HOST: b"h", Tier.DISK: b"d"}
_REMOVED_FIELD = b"r"


class RedisDirectory:
    """A `Directory`; see the module. Connects at the first call, and again by itself.

    Args:
        url: redis://, rediss:// or unix://, with credentials and database if need be.
        cluster: Keeps clusters on one Redis apart.
        ttl_s: How long what a worker wrote outlives its last heartbeat.

    Raises ConfigError for a malformed URL.
    """

    def __init__(self, url: str, cluster: str, ttl_s: float = TTL_S) -> None:
        try:
            # Any: redis-py types answers as bytes or str, sync or async at once; what matters is checked when parsed.
            self._redis: Any = Redis.from_url(
                url,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                # Each call is bounded as a whole, below. With a socket timeout redis-py sends under wait_for, which
                # before Python 3.12 may swallow a cancellation: tasks that call this would then never stop.
                socket_timeout=None,
                health_check_interval=HEALTH_CHECK_INTERVAL_S,
                # Callers come again by themselves, within a second.
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigError(f"--redis-url is {url!r}: use redis://host:port/0 or unix:///path ({error})") from error
        self._prefix = f"pdmesh:{cluster}:"
        self._ttl_ms = int(ttl_s * 1000)
        self._logged_keys: set[str] = set()

    async def put(self, info: WorkerInfo) -> bool:
        ref = WorkerRef.of(info)
        async with self._bounded(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.sadd(self._index_key, ref.worker_id)
            pipeline.set(self._worker_key(ref.worker_id), info.to_pb().SerializeToString(), px=self._ttl_ms)
            pipeline.pexpire(self._events_key(ref), self._ttl_ms)
            pipeline.pexpire(self._snapshot_key(ref), self._ttl_ms)
            *_, snapshot_there = await pipeline.execute()
        return bool(snapshot_there)

    async def remove(self, ref: WorkerRef) -> None:
        key = self._worker_key(ref.worker_id)
        left = pb.WorkerInfo(worker_id=ref.worker_id, incarnation=ref.incarnation).SerializeToString()
        async with self._bounded(), self._redis.pipeline(transaction=True) as pipeline:
            while True:
                await pipeline.watch(key)
                registration = self._parse_registration(key, await pipeline.get(key))
                pipeline.multi()
                if registration is None or registration.ref == ref:
                    pipeline.sadd(self._index_key, ref.worker_id)
                    pipeline.set(key, left, px=int(DEPARTURE_TTL_S * 1000))
                pipeline.delete(self._events_key(ref), self._snapshot_key(ref))
                try:
                    await pipeline.execute()
                except WatchError:
                    continue
                return

    async def registrations(self) -> list[Registration]:
        async with self._bounded():
            worker_ids = sorted(
                member.decode(errors="replace") for member in await self._redis.smembers(self._index_key)
            )
            if not worker_ids:
                return []
            keys = [self._worker_key(worker_id) for worker_id in worker_ids]
            values = await self._redis.mget(keys)
            for worker_id, key, value in zip(worker_ids, keys, values, strict=True):
                if value is None:
                    await self._forget_unless_back(worker_id, key)
        parsed = (self._parse_registration(key, value) for key, value in zip(keys, values, strict=True))
        return [registration for registration in parsed if registration is not None]

    async def append_event(self, ref: WorkerRef, event: BlockEvent) -> None:
        key = self._events_key(ref)
        async with self._bounded(), self._redis.pipeline(transaction=True) as pipeline:
            fields = {**_pack_tiers(event.stored), _REMOVED_FIELD: b"".join(event.removed)}
            pipeline.xadd(key, fields, id=f"{event.seq}-0", maxlen=MAX_EVENTS, approximate=True)
            pipeline.pexpire(key, self._ttl_ms)
            await pipeline.execute()

    async def put_snapshot(self, ref: WorkerRef, snapshot: BlockSnapshot) -> None:
        key = self._snapshot_key(ref)
        async with self._bounded(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(key, mapping={b"seq": snapshot.seq, **_pack_tiers(snapshot.held)})
            pipeline.pexpire(key, self._ttl_ms)
            await pipeline.execute()

    async def events(self, after: Mapping[WorkerRef, int]) -> dict[WorkerRef, list[BlockEvent]]:
        if not after:
            return {}
        refs = {self._events_key(ref): ref for ref in after}
        async with self._bounded(), self._redis.pipeline(transaction=False) as pipeline:
            for ref, seq in after.items():
                pipeline.xrange(self._events_key(ref), min=f"{seq + 1}-0", count=MAX_EVENTS_PER_READ)
            answers = await pipeline.execute(raise_on_error=False)
        found = {}
        for (key, ref), answer in zip(refs.items(), answers, strict=True):
            events = self._parse_events(key, answer)
            if events:
                found[ref] = events
        return found

    async def snapshot(self, ref: WorkerRef) -> BlockSnapshot | None:
        key = self._snapshot_key(ref)
        async with self._bounded():
            try:
                fields = await self._redis.hgetall(key)
            except ResponseError as error:
                self._log_foreign(key, error)
                return None
        if not fields:
            return None
        try:
            return BlockSnapshot(int(fields[b"seq"]), _unpack_tiers(fields))
        except (KeyError, ValueError) as error:
            self._log_foreign(key, error)
            return None

    async def aclose(self) -> None:
        await self._redis.aclose()

    @property
    def _index_key(self) -> str:
        return f"{self._prefix}workers"

    def _worker_key(self, worker_id: str) -> str:
        return f"{self._prefix}worker:{worker_id}"

    def _events_key(self, ref: WorkerRef) -> str:
        return f"{self._prefix}events:{ref.worker_id}:{ref.incarnation}"

    def _snapshot_key(self, ref: WorkerRef) -> str:
        return f"{self._prefix}snapshot:{ref.worker_id}:{ref.incarnation}"

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        """Bounds a call's time, and turns whatever Redis and its sockets raise into one error."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                yield
        except (RedisError, OSError, TimeoutError) as error:
            raise DirectoryUnavailableError(f"Redis: {str(error) or type(error).__name__}") from error

    async def _forget_unless_back(self, worker_id: str, key: str) -> None:
        """Takes an expired worker off the index, unless it registers at this very moment."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            await pipeline.watch(key)
            if await pipeline.exists(key):
                return
            pipeline.multi()
            pipeline.srem(self._index_key, worker_id)
            try:
                await pipeline.execute()
            except WatchError:
                return

    def _parse_registration(self, key: str, value: bytes | None) -> Registration | None:
        """None for nothing, and for what is not ours or of a version we do not know."""
        if value is None:
            return None
        message = pb.WorkerInfo()
        try:
            message.ParseFromString(value)
            ref = WorkerRef(message.worker_id, message.incarnation)
            if key != self._worker_key(ref.worker_id) or not ref.incarnation:
                raise ValueError(f"it names worker {ref.worker_id!r}, incarnation {ref.incarnation!r}")
            left = not message.role and not message.state
            return Registration(ref, None if left else WorkerInfo.from_pb(message))
        except (DecodeError, KeyError, ValueError) as error:
            self._log_foreign(key, error)
            return None

    def _parse_events(self, key: str, answer: Any) -> list[BlockEvent]:
        """The events of an XRANGE answer, up to the first that is not ours."""
        if isinstance(answer, ResponseError):
            self._log_foreign(key, answer)
            return []
        if isinstance(answer, RedisError):
            raise DirectoryUnavailableError(f"Redis: {answer}") from answer
        events = []
        for entry_id, fields in answer or ():
            try:
                seq = int(entry_id.partition(b"-")[0])
                events.append(BlockEvent(seq, _unpack_tiers(fields), _unpack(fields[_REMOVED_FIELD])))
            except (KeyError, ValueError) as error:
                self._log_foreign(key, error)
                break
        return events

    def _log_foreign(self, key: str, error: Exception) -> None:
        if key not in self._logged_keys and len(self._logged_keys) < MAX_LOGGED_KEYS:
            self._logged_keys.add(key)
            log.warning("skipping %s, which is not ours or corrupt: %r", key, error)


def _pack_tiers(blocks: TieredBlocks) -> dict[bytes, bytes]:
    return {name: b"".join(blocks.get(tier, ())) for tier, name in _TIER_FIELDS.items()}


def _unpack_tiers(fields: Mapping[bytes, bytes]) -> TieredBlocks:
    unpacked = {tier: _unpack(fields[name]) for tier, name in _TIER_FIELDS.items()}
    return {tier: hashes for tier, hashes in unpacked.items() if hashes}


def _unpack(packed: bytes) -> tuple[BlockHash, ...]:
    if len(packed) % HASH_BYTES:
        raise ValueError(f"{len(packed)} bytes are not a whole number of hashes")
    return tuple(BlockHash(packed[i : i + HASH_BYTES]) for i in range(0, len(packed), HASH_BYTES))
