"""The engine: one model, its KV cache and the scheduler that serves requests from them. Imports torch, never grpc."""
