"""What plain torch allocates in the middle of a step: its own operations on tensors without values, counted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.backend import kv_dtype
from engine.batch import Batch
from engine.config import EngineConfig
from engine.executor import TorchExecutor
from engine.kv_cache import KVCache
from engine.loader import DTYPES
from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.parallel.shard import Shard

_META = torch.device("meta")
# What oneDNN, which multiplies in half precision on a CPU, keeps of the kernels that it made for the shapes it met.
_ONEDNN_BYTES = 72_000_000


def peak_step_bytes(
    config: EngineConfig, model_config: ModelConfig, shard: Shard, model: CausalLM, max_model_len: int
) -> int:
    """The most that is allocated at once, of the two steps that take most: the last chunk of the longest request, and
    a full batch of requests that are as long together.

    Args:
        model: Of the shard; goes to the "meta" device.
        max_model_len: Tokens of the longest request.
    """
    dtype = DTYPES[config.dtype_name]
    kv_cache = KVCache(
        model_config, num_blocks=1, block_size=config.block_size, dtype=dtype, device=_META,
        kv_dtype=kv_dtype(config, dtype), kv_heads=shard.kv_heads, layers=shard.layers,
    )  # fmt: skip
    executor = TorchExecutor(model.to(_META), kv_cache, last_stage=shard.last_stage)
    chunk = min(config.max_prefill_chunk, config.max_num_batched_tokens, max_model_len)
    decodes = [max(max_model_len // config.max_num_seqs, 1)] * config.max_num_seqs
    steps = [
        _batch([chunk], [max_model_len], config.block_size),
        _batch([1] * len(decodes), decodes, config.block_size),
    ]
    peak = max(_peak(executor, batch, _hidden(batch, model_config, shard, dtype)) for batch in steps)
    return peak + (_ONEDNN_BYTES if config.torch_device.type == "cpu" and dtype != torch.float32 else 0)


def _peak(executor: TorchExecutor, batch: Batch, hidden: torch.Tensor | None) -> int:
    with _LiveBytes() as live, _FusedAttention():
        executor.forward(batch, hidden)
    peak: int = live.peak
    return peak


def _batch(query_lens: Sequence[int], seq_lens: Sequence[int], block_size: int) -> Batch:
    num_tokens = sum(query_lens)
    rows = torch.zeros(num_tokens, dtype=torch.int64, device=_META)
    num_blocks = -(-max(seq_lens) // block_size)
    return Batch(
        input_ids=rows,
        positions=rows,
        slot_mapping=rows,
        query_lens=np.array(query_lens),
        seq_lens=np.array(seq_lens),
        block_tables=torch.zeros(len(seq_lens), num_blocks, dtype=torch.int64, device=_META),
        output_lens=np.ones(len(query_lens), np.int64),
    )


def _hidden(batch: Batch, config: ModelConfig, shard: Shard, dtype: torch.dtype) -> torch.Tensor | None:
    """What the stage before hands on."""
    if shard.first_stage:
        return None
    return torch.empty(len(batch.input_ids), config.hidden_size, dtype=dtype, device=_META)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums what operations have allocated and nobody has let go of.

    Attributes:
        peak: The most there was of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live: dict[int, _Allocation] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._live[storage._cdata] = _Allocation(storage)
        self._live = {key: allocation for key, allocation in self._live.items() if allocation.alive}
        self.peak = max(self.peak, sum(allocation.num_bytes for allocation in self._live.values()))
        return result


class _Allocation:
    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.num_bytes = storage.nbytes()
        self._reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    @property
    def alive(self) -> bool:
        return not self._reference.expired()  # type: ignore[no-untyped-call]


class _FusedAttention(TorchFunctionMode):
    """Attention without its scores, as the devices' kernels compute it; on "meta", torch would take them apart."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            queries: torch.Tensor = args[0]
            return torch.empty_like(queries)
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
