"""Computing on a CPU: C++ kernels, compiled for the machine at hand, and the executor that runs a model with them."""
