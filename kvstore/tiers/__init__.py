"""Where KV blocks go that a worker's block pool evicted: host memory, then disk."""
