"""What a model gains by being spread over ranks: speed, memory, and what the ranks' talk costs.

models      random Llamas, and what one of several ranks has of them
leading     a process that leads a group and decodes, told by JSON lines what to do
decode      decode speed by tensor-parallel degree, beside as many ranks at once that never talk
footprint   what each rank has in memory
sums        all-reduce over shared memory beside Gloo's
pipeline    one prompt over two stages, cut into micro-batches, beside the ideal
others      how much of the machine other processes used meanwhile
figures     medians, ratios, and whether they are as wanted
tables      the figures, for a person
"""
