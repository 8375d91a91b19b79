"""From a config to an engine that can be stepped: the model, then a KV cache in the memory which that leaves.

In a group of ranks each does so with its shard, and between loading and making they agree on the number of blocks
(engine/parallel/wire.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.api import BlockMemory, RankInfo
from engine.backend import (
    Backend,
    choose_backend,
    cpu_kernels,
    kv_dtype,
    kv_layout,
    packs,
    place_model,
    weight_quantization,
)
from engine.config import CacheSize, EngineConfig, available_memory_bytes, cache_size
from engine.core import EngineCore
from engine.cpu.packed_model import PackedModel
from engine.executor import OneProcess, StepExecutor
from engine.kv_cache import KVCache, bytes_per_block
from engine.loader import ALONE, DTYPES, LoadedModel, Split, fill_all
from engine.model_config import ModelConfig
from engine.parallel.exchange import GroupDownError
from engine.parallel.group import RankGroup
from engine.parallel.host_exchange import ExchangeSizes
from engine.parallel.leader import Leader, agree
from engine.parallel.rank import Rank
from engine.parallel.staging import StagedMemory
from engine.parallel.wire import Begin, Loaded, Serve, Serving
from engine.runner import PROMPT_LOGITS_ROWS, ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig
from engine.weights.quantized import UNQUANTIZED, Quantization
from pdmesh.errors import ConfigError
from pdmesh.kv_memory import seal
from pdmesh.types import BlockRun, KVNode, ModelInfo, PairingFacts


class ModelLoader(Protocol):
    """`engine.loader.load_model`, or what stands in for it."""

    def __call__(
        self,
        source: str,
        dtype: str,
        device: torch.device,
        on_progress: Callable[[int, int], None],
        split: Split = ALONE,
        keeps_stored: Callable[[ModelConfig], bool] = fill_all,
        quantization: Quantization = UNQUANTIZED,
    ) -> LoadedModel: ...


@dataclass(frozen=True, slots=True)
class Assembly:
    """A core, and what those outside its thread may know of it.

    Attributes:
        memory: Of whole blocks, as far as they lie on this node.
        kv_nodes: Where the bytes of a block lie, this process's memory first.
        ranks: That it computes with; empty where this process does so alone.
    """

    core: EngineCore
    kv_cache: KVCache
    memory: BlockMemory
    model: ModelInfo
    facts: PairingFacts
    kv_nodes: tuple[KVNode, ...]
    ranks: tuple[RankInfo, ...] = ()


def assemble(
    config: EngineConfig,
    load: ModelLoader,
    on_progress: Callable[[int, int], None],
    *,
    lend_kv: bool = False,
    group: RankGroup | None = None,
) -> Assembly:
    """Loads the model and makes an engine around it, at the leader where there is a group.

    With `lend_kv`, other processes of this host may be lent the KV cache to read.

    Raises:
        ConfigError: before it allocates what cannot fit.
        GroupDownError: where another rank is lost meanwhile.
    """
    part = load_part(config, load, on_progress, group)
    if group is None:
        made = part.make(Serve(part.size.num_blocks, part.size.max_model_len), lend_kv=lend_kv)
        return _around(part, made, OneProcess(made.backend.executor), (_own_node(made),))
    followers = group.to_followers()
    serve, loaded = agree(part.loaded, followers)
    made = part.make(serve)
    ranks, nodes = [made.info], [_own_node(made)]
    for wire, of_rank in zip(followers, loaded, strict=True):
        serving = wire.receive()
        if not isinstance(serving, Serving):
            raise GroupDownError(f"{wire.peer} ended before it served: see its log for why")
        ranks.append(RankInfo(len(ranks), serving.host, serving.pid, of_rank.weight_bytes, serving.kv_bytes))
        if serving.kv_address:
            nodes.append(_other_node(serving, group.place.token))
    for wire in followers:
        wire.send(Begin())
    made.seal_kv()
    memory = None
    if part.device.type == "cuda":
        memory = StagedMemory(made.kv_cache, followers[: group.place.local_size - 1])
    return _around(part, made, Leader(made.rank, followers), tuple(nodes), tuple(ranks), memory)


def load_part(
    config: EngineConfig, load: ModelLoader, on_progress: Callable[[int, int], None], group: RankGroup | None
) -> "LoadedPart":
    """Loads the model, or this rank's shard, and sees how many KV blocks it has room for. Raises ConfigError."""
    device = config.torch_device
    _set_num_threads(config, group)
    if group is not None:
        if device.type == "cuda" and group.config.nnodes > 1 and group.config.local_size > 1:
            raise ConfigError(
                "KV of several GPUs on each of several nodes cannot be moved: use one GPU of each node, or one node"
            )
        if config.compile:
            raise ConfigError("--compile works for one rank alone: leave it out, or --tp and --pp")
        device = group.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    kernels, quantization = cpu_kernels(config, device), weight_quantization(config)
    loaded = load(
        config.model,
        config.dtype_name,
        device,
        on_progress,
        ALONE if group is None else group.split,
        lambda model: config.offloads or packs(config, model, kernels),
        quantization,
    )
    packed = place_model(config, loaded, kernels, device, quantization)
    share = 1.0 if group is None else group.kv_share(loaded, device)
    stored = kv_dtype(config, DTYPES[config.dtype_name])
    block_bytes = bytes_per_block(loaded.config, config.block_size, stored)
    # Of all ranks that take from the same memory, whose parts are alike.
    mapped_bytes = 0 if packed is None else packed.mapped_bytes * (1 if group is None else group.config.local_size)
    available_bytes = int(available_memory_bytes(device, mapped_bytes) / share)
    size = cache_size(config, block_bytes, loaded.config.max_position, available_bytes)
    return LoadedPart(config, loaded, packed, kernels, device, size, group)


@dataclass(frozen=True, slots=True)
class MadePart:
    """What one process computes with."""

    kv_cache: KVCache
    backend: Backend
    group: RankGroup | None
    _rank: Rank | None
    weight_bytes: int
    kv_runs: tuple[BlockRun, ...]

    @property
    def rank(self) -> Rank:
        assert self._rank is not None, "this process is in no group"
        return self._rank

    def seal_kv(self) -> None:
        """All ranks of this node have the KV cache mapped: from now on others may be lent it, to read."""
        assert self.kv_cache.file is not None
        seal(self.kv_cache.file.descriptor)

    @property
    def info(self) -> RankInfo:
        assert self.group is not None
        return self.group.info(self.weight_bytes, self.kv_cache.region_bytes)


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """A model, or a shard, in memory, its matrices packed where CPU kernels compute it.

    Attributes:
        kernels: For this machine's CPU, if it computes with them.
        size: What this would allow, were it alone.
    """

    config: EngineConfig
    model: LoadedModel
    packed: PackedModel | None
    kernels: Path | None
    device: torch.device
    size: CacheSize
    group: RankGroup | None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype_name]

    @property
    def loaded(self) -> Loaded:
        """What a rank says of it."""
        size, model = self.size, self.model
        return Loaded(size.num_blocks, size.max_model_len, model.digest, model.num_bytes, self.kernels is not None)

    def make(self, serve: Serve, *, lend_kv: bool = False) -> MadePart:
        """Makes a KV cache of so many blocks, and what computes with it. The ranks of a group do this together.

        Raises ConfigError where there is no memory, GroupDownError where another rank is lost.
        """
        config, model, group, shard = self.config, self.model, self.group, self.model.shard
        weight_bytes = model.num_bytes
        stored = kv_dtype(config, self.dtype)
        block_bytes = bytes_per_block(model.config, config.block_size, stored)
        kv_cache = KVCache(
            model.config,
            num_blocks=serve.num_blocks,
            block_size=config.block_size,
            dtype=self.dtype,
            device=self.device,
            kv_dtype=stored,
            layout=kv_layout(config, model.config, self.dtype),
            kv_heads=shard.kv_heads,
            layers=shard.layers,
            lend=lend_kv,
            memory=None if group is None else group.kv_memory(serve.num_blocks * block_bytes),
        )
        exchange = None
        if group is not None:
            exchange = group.open_exchange(
                model,
                ExchangeSizes(
                    max_tokens=config.max_num_batched_tokens,
                    hidden_size=model.config.hidden_size,
                    vocab_size=model.config.vocab_size,
                    max_logit_rows=max(config.max_num_seqs, PROMPT_LOGITS_ROWS),
                ),
                kernels=self.kernels,
                hidden_dtype=torch.float32 if self.packed is not None else self.dtype,
                device=self.device,
            )
        backend = choose_backend(
            config,
            model,
            self.packed,
            kv_cache,
            kernels=self.kernels,
            exchange=exchange,
            max_model_len=serve.max_model_len,
            max_blocks=-(-serve.max_model_len // config.block_size),
        )
        rank = None
        if exchange is not None:
            max_micro_batches = config.micro_batches if shard.pp_size > 1 else 1
            rank = Rank(backend.executor, exchange, last_stage=shard.last_stage, max_micro_batches=max_micro_batches)
        runs = (BlockRun(0, block_bytes),) if group is None else group.kv_runs(model, block_bytes)
        return MadePart(kv_cache, backend, group, rank, weight_bytes, runs)


def _set_num_threads(config: EngineConfig, group: RankGroup | None) -> None:
    """Torch's own choice is a thread for each core; the ranks of a node share them."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif group is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // group.place.local_size))


def _around(
    part: LoadedPart,
    made: MadePart,
    executor: StepExecutor,
    kv_nodes: tuple[KVNode, ...],
    ranks: tuple[RankInfo, ...] = (),
    memory: BlockMemory | None = None,
) -> Assembly:
    config, shape, kv_cache = part.config, part.model.config, made.kv_cache
    max_model_len = min(part.size.max_model_len, kv_cache.num_blocks * config.block_size)
    scheduler_config = SchedulerConfig(
        num_blocks=kv_cache.num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_prefill_chunk=config.max_prefill_chunk,
    )
    runner = ModelRunner(
        executor,
        sampling=made.backend.sampling,
        batch_device=made.backend.batch_device,
        device=part.device,
        block_size=config.block_size,
        vocab_size=shape.vocab_size,
        num_seats=config.max_num_seqs,
        max_blocks=scheduler_config.max_request_blocks,
    )
    return Assembly(
        core=EngineCore(Scheduler(scheduler_config), runner),
        kv_cache=kv_cache,
        memory=memory or kv_cache,
        model=ModelInfo(part.model.name, shape.architecture, shape.vocab_size, max_model_len),
        facts=PairingFacts(
            model_digest=part.model.digest,
            dtype=config.dtype_name,
            kv_dtype=config.kv_dtype_name,
            quantization=config.quantization,
            block_size=config.block_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            kv_layout=kv_cache.layout.name,
        ),
        kv_nodes=kv_nodes,
        ranks=ranks,
    )


def _own_node(made: MadePart) -> KVNode:
    return KVNode(made.kv_runs)


def _other_node(serving: Serving, token: str) -> KVNode:
    offers = tuple((name, address) for name, address in serving.kv_offers)
    return KVNode(tuple(BlockRun(*run) for run in serving.kv_runs), serving.kv_address, token, offers)
