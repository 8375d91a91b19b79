"""Moving KV between two processes: every transport beside memcpy, a bare socket and a bare gRPC stream."""
