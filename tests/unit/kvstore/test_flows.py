"""Flows bring every receiver each of its bytes once, whoever holds what."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.nodes.flows import Flow, Receiver, check_flows, planned_flows
from kvstore.transfer.base import SlicedMemory
from pdmesh.errors import PreconditionError
from pdmesh.types import BlockRun, KVNode
from tests.kv_endpoints import BytesMemory

BLOCK_BYTES = 24

held = st.sets(st.integers(0, BLOCK_BYTES - 1), min_size=1)


def runs_of(places: Iterable[int]) -> tuple[BlockRun, ...]:
    """Bytes as ascending runs, apart from each other."""
    runs: list[BlockRun] = []
    for place in sorted(places):
        if runs and runs[-1].end_bytes == place:
            runs[-1] = BlockRun(runs[-1].offset_bytes, runs[-1].num_bytes + 1)
        else:
            runs.append(BlockRun(place, 1))
    return tuple(runs)


def bytes_of(runs: Iterable[BlockRun]) -> Counter[int]:
    return Counter(place for run in runs for place in range(run.offset_bytes, run.end_bytes))


def senders_of(places: Sequence[set[int]]) -> list[KVNode]:
    return [KVNode(runs_of(of_node)) for of_node in places]


def receivers_of(places: Sequence[set[int]]) -> list[Receiver]:
    return [Receiver(runs_of(of_node), ()) for of_node in places]


def flows_between(senders: Sequence[KVNode], receivers: Sequence[Receiver]) -> list[Flow]:
    return [Flow(receiver, run, ("tcp",)) for _, receiver, run in planned_flows(senders, receivers)]


@given(st.lists(held, min_size=1, max_size=4), st.lists(held, min_size=1, max_size=4))
def test_what_a_receiver_lacks_comes_once_from_the_first_who_has_it(
    at_senders: list[set[int]], at_receivers: list[set[int]]
) -> None:
    senders, receivers = senders_of(at_senders), receivers_of(at_receivers)
    planned = planned_flows(senders, receivers)
    for place, wanted in enumerate(at_receivers):
        earlier: set[int] = set()
        for sender, has in zip(senders, at_senders, strict=True):
            runs = [run for node, receiver, run in planned if node is sender and receiver == place]
            assert bytes_of(runs) == Counter((wanted & has) - earlier)
            assert all(run.num_bytes > 0 for run in runs)
            earlier |= has


@given(st.lists(held, min_size=1, max_size=4), st.lists(held, min_size=1, max_size=4))
def test_the_receiver_takes_what_was_planned_unless_nobody_has_some_byte(
    at_senders: list[set[int]], at_receivers: list[set[int]]
) -> None:
    receivers = receivers_of(at_receivers)
    flows = flows_between(senders_of(at_senders), receivers)
    if set().union(*at_receivers) <= set().union(*at_senders):
        check_flows(flows, receivers)
    else:
        with pytest.raises(PreconditionError, match="has not the bytes"):
            check_flows(flows, receivers)


@given(st.lists(held, min_size=1, max_size=3), st.data())
def test_flows_that_leave_out_a_byte_or_bring_one_twice_or_to_nobody_are_refused(
    at_receivers: list[set[int]], data: st.DataObject
) -> None:
    receivers = receivers_of(at_receivers)
    flows = flows_between([KVNode((BlockRun(0, BLOCK_BYTES),))], receivers)
    check_flows(flows, receivers)
    which = data.draw(st.integers(0, len(flows) - 1))
    flow, others = flows[which], flows[:which] + flows[which + 1 :]
    run = flow.run
    wrong = data.draw(
        st.sampled_from(
            [
                [],
                [flow, flow],
                [replace(flow, run=BlockRun(run.offset_bytes, run.num_bytes + 1))],
                [replace(flow, run=BlockRun(run.offset_bytes + 1, run.num_bytes))],
                [replace(flow, run=BlockRun(run.offset_bytes, run.num_bytes - 1))],
                [flow, replace(flow, run=BlockRun(run.end_bytes - 1, 1))],
                [flow, replace(flow, run=BlockRun(run.end_bytes, 0))],
                [flow, replace(flow, run=BlockRun(run.offset_bytes, 0))],
                [replace(flow, receiver=len(receivers))],
                [flow, replace(flow, receiver=len(receivers))],
            ]
        )
    )
    with pytest.raises(PreconditionError) as refused:
        check_flows([*others, *wrong], receivers)
    assert refused.value.reason == "KV_FLOWS"


def test_heads_by_host_and_layers_by_host_meet_in_the_middle() -> None:
    # Two heads of two layers of six bytes: senders hold a layer each, receivers a head.
    layers = [KVNode((BlockRun(0, 6), BlockRun(12, 6))), KVNode((BlockRun(6, 6), BlockRun(18, 6)))]
    heads = [Receiver((BlockRun(0, 12),), ()), Receiver((BlockRun(12, 12),), ())]
    assert planned_flows(layers, heads) == [
        (layers[0], 0, BlockRun(0, 6)),
        (layers[1], 0, BlockRun(6, 6)),
        (layers[0], 1, BlockRun(12, 6)),
        (layers[1], 1, BlockRun(18, 6)),
    ]


def test_a_slice_of_memory_is_its_run_of_every_block() -> None:
    memory = BytesMemory(3, BLOCK_BYTES, seed=1)
    before = memory.content
    sliced = SlicedMemory(memory, BlockRun(8, 10))
    assert (sliced.block_bytes, sliced.file) == (10, memory.file)
    for block_id in range(3):
        assert sliced.place(block_id) == memory.place(block_id) + 8
        assert bytes(sliced.view(block_id)) == before[sliced.place(block_id) :][:10]
    sliced.view(1)[:] = bytes(10)
    place = sliced.place(1)
    assert memory.content == before[:place] + bytes(10) + before[place + 10 :]


@pytest.mark.parametrize("run", [BlockRun(0, BLOCK_BYTES + 1), BlockRun(BLOCK_BYTES, 1), BlockRun(3, 0)])
def test_a_slice_lies_within_its_blocks(run: BlockRun) -> None:
    with pytest.raises(AssertionError):
        SlicedMemory(BytesMemory(3, BLOCK_BYTES), run)
