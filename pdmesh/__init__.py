"""pdmesh: language models served with prefill and decode in separate pools.

This package is the leaf that every other part imports: contracts, values, errors, the client. It needs neither
torch nor Redis.
"""

__version__ = "0.1.0"
