"""A group of rank processes: one worker's model, divided among processes of one or several nodes.

    config       what the operator asks for: --tp, --pp, --nnodes
    place        what a rank process is told of its place in the group
    control      a rank's line to its supervisor
    generation   one start of the group, and its end
    process      one rank: started, looked at, ended
    launch       the ranks of a node and what they inherit: sockets, shared memory
    node         the ranks of a node in one generation: watched, and taken down together
    link         a connection between the supervisors of two nodes, with a heartbeat
    hello        what a node says of itself, and whether it fits
    rendezvous   where node 0 meets the others
    stop         whether a supervisor was told to stop
    leader       node 0's supervisor: starts every generation, judges its end
    follower     any other node's
    supervisor   what a command becomes that has more than one rank

Rank 0 leads: it serves and schedules; the others follow it. One rank's end is the end of them all, at once and with
its reason; then the group starts again as the next generation, with sockets and memory of its own.
"""
