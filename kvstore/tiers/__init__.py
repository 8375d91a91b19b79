"""Where KV blocks lie, from the engine's block pool outwards."""
