"""The prefill service: computes prompts and ships their KV to decode workers."""
