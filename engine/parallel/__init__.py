"""One model over several ranks: processes that each hold a part of it and compute every step together.

shard         what a rank holds: heads, layers, columns, rows of the vocabulary
batches       a step, cut into micro-batches for a pipeline
wire          what the leader says to the others: one small message for each step
exchange      what ranks give each other within a step: sums, hidden states, logits
host_exchange … over memory that the ranks of one host share
distributed   … over torch.distributed, for ranks on several hosts and on GPUs
store         where those leave each other their addresses
rank          one rank's part of a step, the same on all of them
leader        rank 0, as the runner sees it: a step of the whole group
group         this process's place: sockets, memory, which exchange
follower      every other rank: a process that does what it is told
spawn         a group without a supervisor, for whoever embeds an engine
"""
