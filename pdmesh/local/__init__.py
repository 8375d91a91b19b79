"""A whole cluster as processes of one machine.

    config    what the operator asked for
    commands  the command line of each process that this takes
    child     one process: its log, its end
    cluster   all of them: start, watch, restart, stop

`die_with_parent` runs in the children: none outlives the process that started it, however that one ends.
"""
