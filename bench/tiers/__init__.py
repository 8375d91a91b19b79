"""What it is worth to keep KV: the time to a prompt's first token, its KV brought from a tier or a store, or computed.

ways      whence KV comes, the cluster that each takes, and what proves it
rounds    asks one cluster for prompts that are new and prompts that were evicted, in turns
counters  what the cluster's processes say that they gave
figures   medians, ratios, and whether they are as wanted
"""
