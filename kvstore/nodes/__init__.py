"""KV that moves between workers of which either may be spread over several machines.

Each node of a worker holds some bytes of every block. What two nodes have in common travels straight between them, as a
flow: a transfer like any other, of slices of blocks (kvstore/transfer), with tickets and a shipment of its own.

flows       which flows bring a receiver all that it lacks
arrival     a prompt's flows, at the receiver
departure   … and at the sender
remote      a flow of another node of this worker, steered from its leader
servicer    that node's side of it: the service KVNode

A worker on one machine has one node, and a prompt one flow, of whole blocks.
"""
