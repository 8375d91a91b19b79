"""Whether the CUDA kernels can serve a model here. Imports neither Triton nor what needs it."""

import importlib.util

import torch

from engine.decoder_config import AlibiPositions, DecoderLayers
from engine.model_config import ModelConfig

# Beyond, a program's tile of queries does not fit.
MAX_HEAD_DIM = 256
MAX_GROUP = 32
# Triton's oldest, and the first with bfloat16.
_MIN_CAPABILITY = (8, 0)


def unsupported(config: ModelConfig) -> str | None:
    """Why the kernels cannot serve a model of this shape, whatever the device; None: they can."""
    if config.head_dim > MAX_HEAD_DIM:
        return f"the model's heads have {config.head_dim} dimensions, and {MAX_HEAD_DIM} are supported"
    group = config.num_heads // config.num_kv_heads
    if group > MAX_GROUP:
        return f"the model has {group} query heads for each KV head, and {MAX_GROUP} are supported"
    if any(window is not None for window in config.windows):
        return "the model attends over sliding windows"
    layers = DecoderLayers.of(config)
    if layers.attention.soft_cap is not None:
        return "the model caps its attention's scores"
    if layers.attention.score_scale is not None:
        return "the model scales its attention's scores in a way of its own"
    if isinstance(layers.positions, AlibiPositions):
        return "the model adds to scores by distance (ALiBi)"
    if layers.experts is not None:
        return "the model has mixtures of experts"
    return None


def no_kernels_because(config: ModelConfig, device: torch.device) -> str | None:
    """Why no `CudaExecutor` can be made on a CUDA device; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return "the device is older than compute capability 8.0"
    return unsupported(config)
