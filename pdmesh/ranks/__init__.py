"""A group of rank processes: one worker's model, divided among processes of one or several nodes.

    config       what the operator asks for: --tp, --pp, --nnodes
    place        what a rank process is told of its place in the group
    control      a rank's line to its supervisor
    launch       what the ranks of a node inherit: sockets, shared memory
    processes    the ranks of one node in one generation: started, watched, taken down
    link         a connection between the supervisors of two nodes, with a heartbeat
    rendezvous   where they find each other
    leader       node 0's supervisor: gathers the nodes, starts every generation, says why one ends
    follower     any other node's
    supervisor   what a command becomes that has more than one rank

Rank 0 leads: it serves and schedules; the others follow it. One rank's end is the end of them all, told at once with its
reason; then the group starts again as the next generation, with sockets and memory of its own.
"""
