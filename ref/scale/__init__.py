"""Many processes, large models, being killed: what a run needs whatever it trains. Knows nothing of the paper.

processes    which process owns which groups, and the two things that are exchanged
weights      trained weights by name, whole or in parts
sharding     all weights in parts on several GPUs (FSDP2)
checkpoint   atomic files, checkpoints
directory    a run's directory: whose it is, and that nothing in it is lost
signals      ended by Ctrl-C, SIGTERM or SIGHUP: saved first
microbatch   the largest micro-batch, by trial
allocator    memory that a process keeps: fewer page faults on the CPU
memory       running out of it, in one line
paths        places that can be written
textfiles    prompts, tables and JSON as people save them
shown        what a run shows: lines, bars, pictures
stopwatch    seconds and memory of an iteration's phases
"""
