"""Where KV blocks lie when no engine's cache has room for them: host memory, disk, a shared store."""
