"""All that concerns KV blocks and no tensor arithmetic: who is alive and where blocks lie (directory), and how block
bytes get from one worker to another (transfer).
"""
