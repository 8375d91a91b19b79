"""What prefill and decode workers have in common: a process that loads an engine, says so, and can be drained."""
