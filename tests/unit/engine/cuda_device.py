"""Where the tests of the CUDA kernels run: on a CUDA device, or without one in Triton's interpreter."""

import os

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def kernel_device() -> torch.device:
    """The device to test kernels on. Skips the module that calls it where there is none."""
    pytest.importorskip("triton", reason="needs Triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
    return torch.device("cpu")
