"""KV blocks that one process has and another wants: `pdmesh.v1.KVBlocks` and `KVStore`.

shelf      where blocks are taken from: a worker's cache, a store's memory
fetching   the calling end of Fetch
putting    the calling end of Put
servicer   the called end of Fetch
"""
