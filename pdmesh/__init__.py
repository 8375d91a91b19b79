"""pdmesh: language models served with prefill and decode in separate pools.

This package is the leaf that every other part imports: contracts, values, errors, the client. It needs neither
torch nor Redis.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdmesh.async_client import AsyncClient
    from pdmesh.client import Client

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    # On demand: the engine imports values from this package and must not come to import gRPC by it.
    if name == "Client":
        from pdmesh.client import Client

        return Client
    if name == "AsyncClient":
        from pdmesh.async_client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
