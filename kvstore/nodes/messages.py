"""The words of flows on the wire."""

from collections.abc import Iterable

from kvstore.nodes.flows import Flow, Receiver
from kvstore.transfer.messages import offers_from_pb, offers_to_pb, run_from_pb, run_to_pb
from pdmesh.v1 import kv_transfer_pb2 as pb


def receivers_to_pb(receivers: Iterable[Receiver]) -> list[pb.KVReceiver]:
    return [
        pb.KVReceiver(runs=map(run_to_pb, receiver.runs), offers=offers_to_pb(receiver.offers))
        for receiver in receivers
    ]


def receivers_from_pb(receivers: Iterable[pb.KVReceiver]) -> tuple[Receiver, ...]:
    return tuple(
        Receiver(tuple(map(run_from_pb, receiver.runs)), tuple(offers_from_pb(receiver.offers)))
        for receiver in receivers
    )


def flows_to_pb(flows: Iterable[Flow]) -> list[pb.KVFlow]:
    return [
        pb.KVFlow(
            receiver=flow.receiver, run=run_to_pb(flow.run), transports=flow.transports, unusable=dict(flow.unusable)
        )
        for flow in flows
    ]


def flows_from_pb(flows: Iterable[pb.KVFlow]) -> tuple[Flow, ...]:
    return tuple(
        Flow(flow.receiver, run_from_pb(flow.run), tuple(flow.transports), tuple(flow.unusable.items()))
        for flow in flows
    )
