"""Text and tokens: the one place of the mesh that knows about text. Pure: no gRPC, no event loop."""
