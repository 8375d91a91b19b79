"""Computing on a CUDA device: attention kernels that read blocks in place, and graphs of whole decode steps.

support            whether they can serve a model here
kernels            what runs on the device, in Triton
attention_work     who attends to what in a step, worked out on the host
paged_attention    the kernels as an `Attention`
upload             one copy to the device per step
decode_graphs      recorded decode steps, one per batch size
eager_steps        all other steps
executor           `CudaExecutor`: a graph where there is one, else module by module
"""
