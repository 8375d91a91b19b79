"""Which transports this installation has; for configurations, which load none of them."""

import importlib.util

HAS_NIXL = importlib.util.find_spec("nixl_cu12") is not None
"""Whether the extra `pdmesh[nixl]` is installed; the library is not loaded for that."""

# Best first. nixl after tcp: it is slower within a host (2.3 against 2.8 GiB/s), and a sixth as fast where it has
# nothing but TCP (0.5 against 2.8); who has RDMA names it first.
TRANSPORTS = ("shm", "tcp", *(("nixl",) if HAS_NIXL else ()), "grpc")
