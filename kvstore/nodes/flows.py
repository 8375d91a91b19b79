"""Which flows bring a receiver every byte of its blocks, once."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.transfer.base import TransportOffer
from pdmesh.errors import PreconditionError
from pdmesh.types import BlockRun, KVNode


@dataclass(frozen=True, slots=True)
class Receiver:
    """A node that receives: which bytes of each block, and over which transports, best first."""

    runs: tuple[BlockRun, ...]
    offers: tuple[TransportOffer, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """What travels from one node to another.

    Attributes:
        receiver: Its place among the receivers.
        run: Of each block.
        transports: That the sender can use, best first.
        unusable: Why it cannot use the others, by name.
    """

    receiver: int
    run: BlockRun
    transports: tuple[str, ...]
    unusable: tuple[tuple[str, str], ...] = ()


def planned_flows(senders: Sequence[KVNode], receivers: Sequence[Receiver]) -> list[tuple[KVNode, int, BlockRun]]:
    """The sending node, the receiver's place and the bytes of each flow.

    Where several senders hold the same bytes, the first of them sends them.
    """
    flows = []
    for place, receiver in enumerate(receivers):
        lacking = list(receiver.runs)
        for sender in senders:
            common = [run for wanted in lacking for held in sender.runs if (run := _common(wanted, held))]
            flows += [(sender, place, run) for run in common]
            lacking = [rest for wanted in lacking for rest in _without(wanted, common)]
    return flows


def check_flows(flows: Sequence[Flow], receivers: Sequence[Receiver]) -> None:
    """Raises PreconditionError unless these flows bring each receiver each of its bytes once."""
    if any(flow.run.num_bytes <= 0 for flow in flows):
        raise PreconditionError("a flow of no bytes", reason="KV_FLOWS", stage="transfer")
    for place, receiver in enumerate(receivers):
        runs = sorted(flow.run for flow in flows if flow.receiver == place)
        if _joined(runs) != list(receiver.runs):
            raise PreconditionError(
                f"the sender has not the bytes of a block that receiver {place} holds, or has some twice: {runs} are "
                f"to bring {list(receiver.runs)}",
                reason="KV_FLOWS",
                stage="transfer",
            )
    if any(not 0 <= flow.receiver < len(receivers) for flow in flows):
        raise PreconditionError("a flow to nobody", reason="KV_FLOWS", stage="transfer")


def _common(one: BlockRun, other: BlockRun) -> BlockRun | None:
    begin, end = max(one.offset_bytes, other.offset_bytes), min(one.end_bytes, other.end_bytes)
    return BlockRun(begin, end - begin) if begin < end else None


def _without(run: BlockRun, taken: Sequence[BlockRun]) -> list[BlockRun]:
    """What is left of a run; `taken` are parts of it, or of others, and disjoint."""
    left, begin = [], run.offset_bytes
    for part in sorted(taken):
        if run.offset_bytes <= part.offset_bytes < run.end_bytes:
            left.append(BlockRun(begin, part.offset_bytes - begin))
            begin = part.end_bytes
    left.append(BlockRun(begin, run.end_bytes - begin))
    return [rest for rest in left if rest.num_bytes]


def _joined(runs: Sequence[BlockRun]) -> list[BlockRun]:
    """Ascending runs, those that touch made one; runs that overlap stay apart, and equal nothing."""
    joined: list[BlockRun] = []
    for run in runs:
        if joined and joined[-1].end_bytes == run.offset_bytes:
            joined[-1] = BlockRun(joined[-1].offset_bytes, joined[-1].num_bytes + run.num_bytes)
        else:
            joined.append(run)
    return joined
