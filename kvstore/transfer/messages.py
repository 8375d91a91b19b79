"""The words of a transfer on the wire, for every service whose streams carry them."""

from collections.abc import Iterable

from kvstore.transfer.base import Grant, TransportOffer
from pdmesh.errors import MeshError
from pdmesh.types import BlockRun
from pdmesh.v1 import kv_transfer_pb2 as pb


def offers_to_pb(offers: Iterable[TransportOffer]) -> list[pb.TransportOffer]:
    return [pb.TransportOffer(name=offer.name, address=offer.address) for offer in offers]


def offers_from_pb(offers: Iterable[pb.TransportOffer]) -> list[TransportOffer]:
    return [TransportOffer(offer.name, offer.address) for offer in offers]


def run_to_pb(run: BlockRun) -> pb.BlockRun:
    return pb.BlockRun(offset_bytes=run.offset_bytes, num_bytes=run.num_bytes)


def run_from_pb(run: pb.BlockRun) -> BlockRun:
    return BlockRun(run.offset_bytes, run.num_bytes)


def grant_to_pb(number: int, grant: Grant, flow: int = 0) -> pb.TransferGrant:
    """`number` counts the flow's grants."""
    return pb.TransferGrant(
        ticket=grant.ticket,
        epoch=grant.epoch,
        transport=grant.transport,
        address=grant.address,
        number=number,
        flow=flow,
    )


def grant_from_pb(grant: pb.TransferGrant) -> Grant:
    """Its number and flow stand beside it."""
    return Grant(bytes(grant.ticket), grant.epoch, grant.transport, grant.address)


def failed_to_pb(grant_number: int, error: MeshError, flow: int = 0) -> pb.TransferFailed:
    return pb.TransferFailed(grant_number=grant_number, reason=error.reason, message=error.message, flow=flow)
