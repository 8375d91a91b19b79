"""Whether the CUDA kernels can serve a model here. Imports neither Triton nor what needs it."""

import importlib.util
import logging

import torch

from engine.decoder_config import AlibiPositions, DecoderLayers
from engine.model_config import ModelConfig

log = logging.getLogger(__name__)

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


def can_use_kernels(config: ModelConfig, device: torch.device) -> bool:
    """Whether to make a `CudaExecutor`; where not, and the device is CUDA, a warning says why."""
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        reason: str | None = "Triton is not installed: pip install triton"
    elif torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        reason = "the device is older than compute capability 8.0"
    else:
        reason = unsupported(config)
    if reason is not None:
        log.warning("computing in plain torch, several times slower than the CUDA kernels: %s", reason)
    return reason is None
