"""Runs a model on a CPU with the kernels: one call for all layers of a step, which leaves the interpreter free."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.batch import Batch
from engine.cpu.angles import angles_of
from engine.cpu.library import Decoder, Finish, Group, Kernels, Kind, Operation, Step
from engine.cpu.lowering import PartialRows, lower_decoder
from engine.cpu.packed_model import PackedModel
from engine.cpu.packing import PACK, padded
from engine.cpu.pages_ahead import PagesAhead
from engine.cpu.program import MAX_EXPERTS, Program, Rows
from engine.decoder_config import DecoderLayers
from engine.kv_cache import KVCache, KVLayout
from engine.loader import LoadedModel
from engine.model_config import ModelConfig
from engine.models.decoder import DecoderForCausalLM

# kernels/attention.h: keys are read 16 at a time, and a head's dimensions written so.
_LANES = 16
_MAX_HEAD_DIM = 256

# Multiply-adds of a step below which one thread computes it: threads that meet after each operation would wait for
# each other longer than they work.
_MIN_SHARED_WORK = 5_000_000


def cpu_layout(
    config: ModelConfig, block_size: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> KVLayout | None:
    """The KV layout that the kernels read; None where they cannot serve the model.

    Args:
        dtype: What the model computes in.
        kv_dtype: What K and V are stored in: torch.int8, or None for `dtype`.
    """
    experts = DecoderLayers.of(config).experts
    if experts is not None and (experts.num_experts > MAX_EXPERTS or DecoderLayers.of(config).mlp.bias):
        return None
    if dtype not in PACK or block_size % _LANES or config.head_dim % _LANES or config.head_dim > _MAX_HEAD_DIM:
        return None
    # int8 becomes integers of 16 bits, of which a multiply-add takes two.
    return KVLayout(2 if kv_dtype == torch.int8 else PACK[dtype])


@dataclass(frozen=True, slots=True)
class SharedSums:
    """How ranks that share every layer add up their partial results: over shared memory, within the kernels' one call.

    Attributes:
        group: Of these ranks.
        partial_rows: Where the results lie meanwhile.
    """

    group: Group
    partial_rows: PartialRows


# Or between calls of the kernels, by whatever sums a float32 tensor over the ranks in place.
SumsBetween = Callable[[torch.Tensor], torch.Tensor]


class CpuExecutor:
    """A `ModelExecutor`.

    Args:
        packed: The matrices of the loaded model, whose other parameters have values.
        kv_cache: In `cpu_layout`; of the heads and layers of the model's shard.
        max_tokens: Of a step.
        max_position: Tokens of the longest request.
        sums: Of ranks that share layers.
    """

    def __init__(
        self,
        kernels: Kernels,
        loaded: LoadedModel,
        packed: PackedModel,
        kv_cache: KVCache,
        *,
        max_tokens: int,
        max_position: int,
        num_threads: int,
        sums: SharedSums | SumsBetween | None = None,
    ) -> None:
        config, shard = loaded.config, loaded.shard
        layers = DecoderLayers.of(config)
        assert isinstance(loaded.model, DecoderForCausalLM)
        assert (kv_cache.num_kv_heads, kv_cache.num_layers) == (len(shard.kv_heads), len(shard.layers))
        self._kernels = kernels
        self._logit_cap = layers.logit_soft_cap
        self._num_threads = num_threads
        self._program = Program(max_tokens, kernels.dtype)
        within = sums if isinstance(sums, SharedSums) else None
        partial_rows = within.partial_rows if within else self._private_rows
        angles = angles_of(layers.positions, config.head_dim, max_position)
        int8_kv = kv_cache.scales is not None
        self._model = lower_decoder(
            loaded.model.model, layers, packed, shard, angles, self._program, partial_rows, int8_kv=int8_kv
        )
        self._sum_between = sums if callable(sums) else None
        self._segments = self._program.segments(sums=self._sum_between is not None, layers=bool(packed.waiting))
        # Of the layers and the output matrix that wait in a file, which unit each is.
        self._waiting = {name: unit for unit, name in enumerate(packed.waiting)}
        self._pages = PagesAhead(list(packed.waiting.values())) if packed.waiting else None
        self._layers = shard.layers
        # In which matrices lie, mapped as long as this lives.
        self._files = packed.files
        # Its memory is used by address.
        self._kv_cache = kv_cache
        block_stride, head_stride, layer_stride = kv_cache.data.stride()[:3]
        self._decoder = Decoder(
            cache=kv_cache.data.data_ptr(),
            int8_cache=int8_kv,
            num_heads=len(shard.heads),
            num_kv_heads=len(shard.kv_heads),
            head_dim=config.head_dim,
            block_size=kv_cache.block_size,
            block_stride=block_stride,
            head_stride=head_stride,
            layer_stride=layer_stride,
            group=ctypes.pointer(within.group) if within else None,
        )
        # Memory is taken from the system as it is first written: rows that no step needs cost nothing.
        self._logits = torch.empty(max_tokens, padded(len(shard.vocab)))

    def forward(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        step, num_tokens, num_outputs = step_of(batch), len(batch.input_ids), int(batch.output_lens.sum())
        residual = self._model.residual
        if hidden is not None:
            residual.values[:num_tokens, : residual.width] = hidden
        for segment in self._segments:
            if segment.layer is not None:
                self._enter(f"model.layers.{self._layers[segment.layer]}")
            self._run(step, segment.operations, self._model.num_weights // len(self._segments))
            partial = segment.partial
            if partial is not None and (num_rows := num_outputs if partial.outputs_only else num_tokens):
                assert self._sum_between is not None
                self._sum_between(partial.values[:num_rows])
        self._check_files()
        output = self._model.hidden
        return output.values[: num_tokens if self._model.lm_head is None else num_outputs, : output.width]

    def logits(self, hidden: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
        num_rows, lm_head = len(hidden), self._model.lm_head
        assert lm_head is not None
        self._enter("lm_head")
        # The kernels write whole panels: a place's columns end with one, or what comes after them in a row is free.
        logits = self._logits[:num_rows, : lm_head.n] if place is None else place
        project = Operation(
            kind=Kind.PROJECT,
            finish=Finish.STORE,
            input=hidden.data_ptr(),
            input_bytes=hidden.stride(0) * hidden.itemsize,
            output=logits.data_ptr(),
            output_bytes=logits.stride(0) * logits.itemsize,
            weight=lm_head.values.data_ptr(),
            format=lm_head.format,
            bias=lm_head.bias.data_ptr(),
            n=lm_head.n,
            k=lm_head.k,
        )
        operations = (Operation * 1)(project)
        if self._logit_cap is not None:
            cap = Operation(
                kind=Kind.CAP,
                output=project.output,
                output_bytes=project.output_bytes,
                n=lm_head.n,
                scale=self._logit_cap,
            )
            operations = (Operation * 2)(project, cap)
        self._run(Step(num_tokens=num_rows), operations, lm_head.num_weights)
        self._check_files()
        return logits

    def _check_files(self) -> None:
        """After what was computed: whoever wrote to a file before its weights were read has left a trace by now."""
        for file in self._files:
            file.check_unchanged()

    def _enter(self, module: str) -> None:
        """Waits until the weights are in memory."""
        if self._pages is not None and module in self._waiting:
            self._pages.enter(self._waiting[module])

    def _private_rows(self, place: int, width: int) -> Rows:
        return self._program.rows(width, torch.float32)

    def _run(self, step: Step, operations: "ctypes.Array[Operation]", num_weights: int) -> None:
        num_threads = self._num_threads if step.num_tokens * num_weights >= _MIN_SHARED_WORK else 1
        self._kernels.run(self._decoder, step, operations, num_threads)


def step_of(batch: Batch) -> Step:
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
