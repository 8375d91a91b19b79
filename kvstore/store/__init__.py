"""A store that several workers share: `python -m kvstore`.

config    what it is told
blocks    what it keeps: tiers of one model's blocks, from the first that a worker puts on
servicer  Put, and a worker's status
service   the process
"""
