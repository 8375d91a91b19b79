"""Runs a model on a CPU with the kernels: one call for all layers of a step, which leaves the interpreter free."""

import ctypes

import torch

from engine.batch import Batch
from engine.cpu.library import Decoder, Finish, Kernels, Kind, Operation, Step
from engine.cpu.llama import lower_llama
from engine.cpu.packing import PACK, Packer, padded
from engine.cpu.program import Program
from engine.kv_cache import KVCache, KVLayout
from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.llama import LlamaForCausalLM
from engine.rope import rotation_table

# kernels/attention.h: keys are read 16 at a time, and a head's dimensions written so.
_LANES = 16
_MAX_HEAD_DIM = 256

# Multiply-adds of a step below which one thread computes it: threads that meet after each operation would wait for
# each other longer than they work.
_MIN_SHARED_WORK = 5_000_000


def cpu_layout(config: ModelConfig, block_size: int, dtype: torch.dtype) -> KVLayout | None:
    """The KV layout that the kernels read; None where they cannot serve the model."""
    if config.architecture != "LlamaForCausalLM" or dtype not in PACK:
        return None
    if block_size % _LANES or config.head_dim % _LANES or config.head_dim > _MAX_HEAD_DIM:
        return None
    return KVLayout(PACK[dtype])


class CpuExecutor:
    """A `ModelExecutor`. Takes the model's weights out of it.

    Args:
        config: The model's as it is run: its heads and layers are those that the cache holds.
        kv_cache: In `cpu_layout`.
        max_tokens: Of a step.
        max_position: Tokens of the longest request.
    """

    def __init__(
        self,
        kernels: Kernels,
        model: CausalLM,
        config: ModelConfig,
        kv_cache: KVCache,
        *,
        max_tokens: int,
        max_position: int,
        num_threads: int,
    ) -> None:
        assert isinstance(model, LlamaForCausalLM)
        assert (kv_cache.num_kv_heads, kv_cache.num_layers) == (config.num_kv_heads, config.num_layers)
        self._kernels = kernels
        self._num_threads = num_threads
        self._program = Program(max_tokens, kernels.dtype)
        self._model = lower_llama(model, self._program, Packer(kernels))
        self._operations = self._program.compile()
        # Its memory is used by address.
        self._kv_cache = kv_cache
        # The kernels read 16 values at once, which for the last positions of narrow heads lie beyond these.
        self._cosines, self._sines = rotation_table(config.rope, config.head_dim, max_position + _LANES)
        block_stride, head_stride, layer_stride = kv_cache.data.stride()[:3]
        self._decoder = Decoder(
            cache=kv_cache.data.data_ptr(),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=kv_cache.block_size,
            block_stride=block_stride,
            head_stride=head_stride,
            layer_stride=layer_stride,
            cosines=self._cosines.data_ptr(),
            sines=self._sines.data_ptr(),
            score_scale=config.head_dim**-0.5,
        )
        # Memory is taken from the system as it is first written: rows that no step needs cost nothing.
        self._logits = torch.empty(max_tokens, padded(config.vocab_size))

    def forward(self, batch: Batch) -> torch.Tensor:
        self._run(self._step(batch), self._operations, self._model.num_weights)
        hidden = self._model.hidden
        return hidden.values[: int(batch.output_lens.sum()), : hidden.width]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        num_rows, lm_head = len(hidden), self._model.lm_head
        project = Operation(
            kind=Kind.PROJECT,
            finish=Finish.STORE,
            input=hidden.data_ptr(),
            input_bytes=hidden.stride(0) * hidden.itemsize,
            output=self._logits.data_ptr(),
            output_bytes=self._logits.stride(0) * self._logits.itemsize,
            weight=lm_head.values.data_ptr(),
            bias=lm_head.bias.data_ptr(),
            n=lm_head.n,
            k=lm_head.k,
        )
        assert num_rows <= len(self._logits)
        self._run(Step(num_tokens=num_rows), (Operation * 1)(project), lm_head.n * lm_head.k)
        return self._logits[:num_rows, : lm_head.n]

    def _step(self, batch: Batch) -> Step:
        """Addresses of the batch's arrays, which must live as long."""
        return Step(
            num_tokens=len(batch.input_ids),
            num_sequences=len(batch.query_lens),
            max_blocks=batch.block_tables.stride(0),
            token_ids=batch.input_ids.data_ptr(),
            positions=batch.positions.data_ptr(),
            slots=batch.slot_mapping.data_ptr(),
            query_lens=batch.query_lens.ctypes.data,
            seq_lens=batch.seq_lens.ctypes.data,
            output_lens=batch.output_lens.ctypes.data,
            block_tables=batch.block_tables.data_ptr(),
        )

    def _run(self, step: Step, operations: "ctypes.Array[Operation]", num_weights: int) -> None:
        num_threads = self._num_threads if step.num_tokens * num_weights >= _MIN_SHARED_WORK else 1
        self._kernels.run(self._decoder, step, operations, num_threads)
