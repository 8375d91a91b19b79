"""What measures pdmesh, always beside a peer or a limit in the same run: figures of one run compare, others do not."""
