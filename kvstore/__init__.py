"""All that concerns KV blocks and no tensor arithmetic: who is alive and where blocks lie (directory), how block bytes
get from one worker to another (transfer), and where those go that left a worker's cache (tiers).
"""
