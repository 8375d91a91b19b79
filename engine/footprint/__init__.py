"""What serving a model will take, before anything is loaded.

ranks      what each rank will hold: its shard of the model made as the engine makes it, on torch's "meta" device
peak       what plain torch allocates in the middle of a step
fit        the KV cache that leaves room for, by the engine's own rule; and what would make it fit
report     all of it, with what the checkpoint is: `inspect_model`
"""
