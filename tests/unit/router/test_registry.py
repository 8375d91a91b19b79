"""Who lives, who pairs, and how load counts up and down between heartbeats."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from kvstore.tiers.base import Tier
from pdmesh.hashing import BlockHash, block_hashes, root_hash
from pdmesh.types import KVSource, Load, ModelInfo, PairingFacts, Role, WorkerInfo, WorkerState
from router.policy import Candidate, Choice
from router.registry import WorkerRegistry

FACTS = PairingFacts("digest", "float32", "float32", 16, 2, 2, 8, "LKHTD")
MODEL = ModelInfo("tiny", "LlamaForCausalLM", 100, 512)
TOKENS = list(range(64))
HASHES = {16: block_hashes(TOKENS, 16, root_hash())}


def worker(worker_id: str, role: Role = Role.DECODE, **fields: Any) -> WorkerInfo:
    info = WorkerInfo(
        worker_id, f"{worker_id}-1", role, WorkerState.READY, f"host:{worker_id}", FACTS, MODEL,
        Load(num_blocks=100, num_free_blocks=100),
    )  # fmt: skip
    return replace(info, **fields)


@dataclass
class World:
    """A registry in a world whose time stands still until told; every registration is seen at each poll."""

    now: float = 0.0
    changes: int = 0
    registered: bool = True
    _last_found: float = 0.0
    registry: WorkerRegistry = field(init=False)

    def __post_init__(self) -> None:
        self.registry = WorkerRegistry("tiny", self.age_s, self.on_change, lambda: self.now)

    def age_s(self, worker_id: str) -> float:
        return self.now - self._last_found

    def on_change(self) -> None:
        self.changes += 1

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.registered:
            self._last_found = self.now

    def usable(self, role: Role = Role.DECODE) -> list[str]:
        """Who takes requests by what operators are shown."""
        return [r.info.worker_id for r in self.registry.records() if r.info.role is role and not r.excluded_because]

    def candidate(self, worker_id: str, hashes: dict[int, list[BlockHash]] | None = None) -> Candidate:
        role = Role.DECODE if worker_id.startswith("d") else Role.PREFILL
        found = {c.worker_id: c for c in self.registry.candidates(role, self.registry.cached_prefixes(hashes or {}))}
        return found[worker_id]


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize(
    ("fields", "because"),
    [
        ({}, ""),
        ({"state": WorkerState.LOADING, "facts": None, "model": None}, "loading"),
        ({"state": WorkerState.DRAINING}, "draining"),
        ({"model": replace(MODEL, name="other")}, "serves other; this router serves tiny"),
    ],
)
def test_who_takes_requests(world: World, fields: dict[str, Any], because: str) -> None:
    world.registry.worker_seen(worker("d0", **fields))
    (record,) = world.registry.records()
    assert record.excluded_because == because
    assert world.registry.usable(Role.DECODE) is not bool(because)
    assert len(world.registry.candidates(Role.DECODE, {})) == (0 if because else 1)


def test_lost_until_news(world: World) -> None:
    world.registry.worker_seen(worker("d0"))
    world.registry.worker_seen(worker("d1"))
    world.registry.mark_lost("d0", "d0-1", "refused connection")
    assert world.usable() == ["d1"]
    assert [c.worker_id for c in world.registry.candidates(Role.DECODE, {})] == ["d1"]
    world.registry.worker_seen(worker("d0", load=Load(num_running=1, num_blocks=100, num_free_blocks=90)))
    assert world.usable() == ["d0", "d1"]


def test_lost_until_its_registration_must_have_been_refreshed(world: World) -> None:
    """An idle worker's heartbeats all look alike; that its registration does not expire says that they come."""
    world.registry.worker_seen(worker("d0"))
    world.registry.mark_lost("d0", "d0-1", "refused connection")
    world.pass_time(2.9)
    assert world.usable() == []
    world.pass_time(0.2)
    assert world.usable() == ["d0"]


def test_the_dead_stay_lost(world: World) -> None:
    world.registry.worker_seen(worker("d0"))
    world.registry.mark_lost("d0", "d0-1", "refused connection")
    world.registered = False
    world.pass_time(60)
    assert world.usable() == []
    world.registry.worker_gone("d0", "d0-1", "expired")
    assert world.registry.records() == []


def test_where_all_are_lost_they_are_tried_all_the_same(world: World) -> None:
    world.registry.worker_seen(worker("d0"))
    world.registry.mark_lost("d0", "d0-1", "refused connection")
    assert not world.registry.usable(Role.DECODE)
    assert [c.worker_id for c in world.registry.candidates(Role.DECODE, {})] == ["d0"]
    assert world.registry.models() == [MODEL]


def test_a_new_incarnation_is_a_new_worker(world: World) -> None:
    world.registry.worker_seen(worker("d0"))
    world.registry.blocks_stored("d0", HASHES[16], Tier.POOL)
    world.registry.mark_lost("d0", "d0-1", "refused connection")
    world.registry.worker_seen(worker("d0", incarnation="d0-2"))
    assert world.usable() == ["d0"]
    assert world.candidate("d0", HASHES).cached_tokens == 0
    # What is said of the first one is not about this one.
    world.registry.mark_lost("d0", "d0-1", "late news")
    world.registry.worker_gone("d0", "d0-1", "late news")
    assert world.usable() == ["d0"]


def test_changes_are_told(world: World) -> None:
    def changed() -> bool:
        before, world.changes = world.changes, 0
        return before > 0

    world.registry.worker_seen(worker("d0", state=WorkerState.LOADING))
    assert changed()
    world.registry.worker_seen(worker("d0"))
    assert changed()
    world.registry.worker_seen(worker("d0", load=Load(num_running=3)))
    assert not changed(), "load alone is no change"
    world.registry.mark_lost("d0", "d0-1", "refused connection")
    assert changed()
    world.registry.worker_gone("d0", "d0-1", "left")
    assert changed()


def test_what_is_assigned_counts_from_then_on(world: World) -> None:
    world.registry.worker_seen(worker("d0"))
    world.registry.worker_seen(worker("p0", Role.PREFILL))
    before = {name: world.candidate(name) for name in ("d0", "p0")}
    assignment = world.registry.assign(Choice("d0", ("p0",), prefill_tokens=64), 64, {})
    assert world.candidate("d0") == replace(before["d0"], num_requests=1, used_blocks=4, turn=1)
    assert world.candidate("p0") == replace(before["p0"], num_requests=1, used_blocks=4, queued_tokens=64, turn=1)
    assert [record.num_assigned for record in world.registry.records()] == [1, 1]
    assignment.prompt_done()
    assert world.candidate("p0") == replace(before["p0"], turn=1), "prefill is through with it"
    assert world.candidate("d0").num_requests == 1
    assignment.close()
    assignment.close()
    assert world.candidate("d0") == replace(before["d0"], turn=1)
    assert [record.num_assigned for record in world.registry.records()] == [0, 0]


def test_a_heartbeat_counts_what_was_assigned_before_it(world: World) -> None:
    world.registry.worker_seen(worker("d0"))
    assignment = world.registry.assign(Choice("d0", decode_tokens=64), 64, {})
    busy = Load(num_running=1, num_queued_tokens=30, num_blocks=100, num_free_blocks=96)
    world.registry.worker_seen(worker("d0", load=busy))
    seen = world.candidate("d0")
    assert (seen.num_requests, seen.queued_tokens, seen.used_blocks) == (1, 30, 4), "once, not twice"
    assignment.close()
    assert world.candidate("d0").num_requests == 0
    assert world.candidate("d0").queued_tokens == 30, "how many of them it has computed only its heartbeat can say"
    world.registry.worker_seen(worker("d0"))
    assert world.candidate("d0").num_requests == 0


def test_an_assignment_outlives_its_worker(world: World) -> None:
    world.registry.worker_seen(worker("d0"))
    assignment = world.registry.assign(Choice("d0", decode_tokens=64), 64, {})
    world.registry.worker_gone("d0", "d0-1", "left")
    world.registry.worker_seen(worker("d0", incarnation="d0-2", address="host:new"))
    assert world.registry.addresses() == {"host:d0", "host:new"}, "its channel is needed yet"
    assignment.close()
    assert world.registry.addresses() == {"host:new"}
    (record,) = world.registry.records()
    assert record.num_assigned == 0
    assert world.candidate("d0").num_requests == 0


def test_cached_prefixes_are_found(world: World) -> None:
    for name in ("d0", "d1"):
        world.registry.worker_seen(worker(name))
    world.registry.blocks_stored("d0", HASHES[16][:3], Tier.HOST)
    world.registry.blocks_reset("d1", {Tier.POOL: HASHES[16]})
    world.registry.blocks_removed("d1", HASHES[16][1:2])
    assert (world.candidate("d0", HASHES).cached_tokens, world.candidate("d0", HASHES).pool_tokens) == (48, 0)
    world.registry.blocks_stored("d0", HASHES[16][1:2], Tier.POOL)
    assert (world.candidate("d0", HASHES).cached_tokens, world.candidate("d0", HASHES).pool_tokens) == (48, 16)
    assert world.candidate("d1", HASHES).cached_tokens == 16
    world.registry.worker_gone("d0", "d0-1", "left")
    world.registry.worker_seen(worker("d0"))
    assert world.candidate("d0", HASHES).cached_tokens == 0


def test_who_cannot_pair_is_never_paired_and_the_log_says_why_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    world.registry.worker_seen(worker("d0"))
    world.registry.worker_seen(worker("p0", Role.PREFILL))
    world.registry.worker_seen(worker("p1", Role.PREFILL, facts=replace(FACTS, dtype="bfloat16")))
    for _ in range(3):
        assert world.candidate("d0").pairs_with == {"p0"}
    assert [r.getMessage() for r in caplog.records] == ["d0 cannot pair with p1: dtype: float32 here, bfloat16 there"]
    excluded = {record.info.worker_id: record.excluded_because for record in world.registry.records()}
    assert excluded["p0"] == ""
    assert "dtype: bfloat16 here, float32 there" in excluded["p1"]
    # It comes back mended.
    world.registry.worker_seen(worker("p1", Role.PREFILL, incarnation="p1-2"))
    assert world.candidate("d0").pairs_with == {"p0", "p1"}


# Stores, and whom KV can be had from.


def test_a_store_is_never_given_a_request(world: World) -> None:
    world.registry.worker_seen(worker("s0", Role.STORE, model=None))
    world.registry.blocks_stored("s0", HASHES[16], Tier.HOST)
    cached = world.registry.cached_prefixes(HASHES)
    assert [world.registry.candidates(role, cached) for role in (Role.PREFILL, Role.DECODE)] == [[], []]
    assert not world.registry.usable(Role.PREFILL)
    assert not world.registry.usable(Role.DECODE)
    assert world.registry.models() == []
    assert world.registry.block_sizes() == set(), "prompts are hashed for those who take them"
    world.registry.worker_seen(worker("d0"))
    world.registry.worker_seen(worker("p0", Role.PREFILL))
    assert world.candidate("d0").pairs_with == {"p0"}


@pytest.mark.parametrize(
    ("fields", "because"),
    [
        ({}, ""),
        ({"state": WorkerState.DRAINING}, ""),
        ({"state": WorkerState.LOADING, "facts": None}, "loading"),
        (
            {"facts": replace(FACTS, dtype="bfloat16")},
            "can pair with no prefill worker: dtype: bfloat16 here, float32 there",
        ),
    ],
)
def test_why_no_kv_comes_from_a_store(world: World, fields: dict[str, Any], because: str) -> None:
    world.registry.worker_seen(worker("p0", Role.PREFILL))
    world.registry.worker_seen(worker("s0", Role.STORE, model=None, **fields))
    excluded = {record.info.worker_id: record.excluded_because for record in world.registry.records()}
    assert excluded["s0"] == because


def sources(world: World, num_tokens: int = 65) -> dict[str, list[tuple[str, int]]]:
    """By prefill worker: who else has how many blocks, as a request for p0 and p1 is told."""
    for name in ("d0", "p0", "p1"):
        if world.registry.info(name) is None:
            world.registry.worker_seen(worker(name, Role.DECODE if name == "d0" else Role.PREFILL))
    cached = world.registry.cached_prefixes(HASHES)
    assignment = world.registry.assign(Choice("d0", ("p0", "p1")), num_tokens, cached)
    assignment.close()
    return {place.info.worker_id: [(s.worker_id, s.num_blocks) for s in place.sources] for place in assignment.prefill}


def hold(world: World, worker_id: str, num_blocks: int, role: Role = Role.PREFILL, **fields: Any) -> None:
    world.registry.worker_seen(worker(worker_id, role, **fields))
    world.registry.blocks_stored(worker_id, HASHES[16][:num_blocks], Tier.HOST)


def test_each_target_is_told_of_those_who_have_more(world: World) -> None:
    assert sources(world) == {"p0": [], "p1": []}
    hold(world, "p0", 2)
    assert sources(world) == {"p0": [], "p1": [("p0", 2)]}
    hold(world, "d0", 3, Role.DECODE)
    assert sources(world) == {"p0": [("d0", 3)], "p1": [("d0", 3), ("p0", 2)]}
    hold(world, "s0", 4, Role.STORE, model=None)
    assert sources(world) == {"p0": [("s0", 4), ("d0", 3)], "p1": [("s0", 4), ("d0", 3)]}, "two at most"


def test_a_source_is_named_with_all_that_a_call_to_it_needs(world: World) -> None:
    hold(world, "s0", 4, Role.STORE)
    world.registry.worker_seen(worker("d0"))
    world.registry.worker_seen(worker("p0", Role.PREFILL))
    cached = world.registry.cached_prefixes(HASHES)
    assignment = world.registry.assign(Choice("d0", ("p0",)), 65, cached)
    assert assignment.prefill[0].sources == (KVSource("s0", "s0-1", "host:s0", 4),)


def test_among_equals_stores_come_first_then_whoever_is_idle(world: World) -> None:
    hold(world, "p7", 4, load=Load(num_running=2))
    hold(world, "p8", 4, load=Load(num_waiting=1))
    hold(world, "p9", 4)
    assert sources(world)["p0"] == [("p9", 4), ("p8", 4)]
    hold(world, "s0", 4, Role.STORE)
    assert sources(world)["p0"] == [("s0", 4), ("p9", 4)]


def test_only_what_is_alive_and_can_pair_is_a_source(world: World) -> None:
    hold(world, "stranger", 4, facts=replace(FACTS, dtype="bfloat16"))
    hold(world, "lost", 4)
    hold(world, "draining", 3)
    world.registry.worker_seen(worker("draining", Role.PREFILL, state=WorkerState.DRAINING))
    world.registry.mark_lost("lost", "lost-1", "refused connection")
    assert sources(world)["p0"] == [("draining", 3)]
    world.registry.worker_gone("draining", "draining-1", "left")
    assert sources(world)["p0"] == []


def test_the_block_of_the_last_token_is_no_reason_to_ask(world: World) -> None:
    hold(world, "p0", 3)
    hold(world, "s0", 4, Role.STORE)
    assert sources(world, num_tokens=64) == {"p0": [], "p1": [("s0", 3), ("p0", 3)]}
    assert sources(world, num_tokens=65) == {"p0": [("s0", 4)], "p1": [("s0", 4), ("p0", 3)]}
