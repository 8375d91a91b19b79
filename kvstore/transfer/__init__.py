"""The transfer service: KV blocks from one worker's memory into another's, verified. See base.py."""
