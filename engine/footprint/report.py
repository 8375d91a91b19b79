"""A model's report: what it is, where it comes from, what serving it takes, and what of it fits here.

Of the model's files no more is read than to open them. The values are plain: `pdmesh model inspect --json` prints them
as they are.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.footprint.fit import Fit, find_fit, remedies
from engine.footprint.ranks import WeightBytes
from engine.loader import check_tensors
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.parallel.shard import possible_tp
from engine.weights.checkpoint import Checkpoint
from engine.weights.source import open_checkpoint
from pdmesh.ranks.config import GroupConfig

# Of requests that are asked for most, as far as the model reads.
_CONTEXTS = (512, 2048, 8192, 32768, 131072)


@dataclass(frozen=True, slots=True)
class Window:
    """Layers that see but the last `num_tokens` tokens."""

    num_tokens: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Identity:
    """What the model is.

    Attributes:
        num_parameters: As the checkpoint stores them: an output matrix that is the embedding counts once.
        max_position: Tokens that it was made for.
    """

    name: str
    architecture: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    windows: tuple[Window, ...]
    tied_output: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tensors that are stored alike."""

    encoding: str
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where it comes from. `num_bytes` is of the tensors."""

    format: str
    files: tuple[str, ...]
    num_bytes: int
    encodings: tuple[Encoded, ...]


@dataclass(frozen=True, slots=True)
class RankUse:
    """Memory of one rank of this machine, in bytes.

    Attributes:
        layers: The first and the last one.
        waiting: Of the weights, what waits elsewhere, by place.
        resident_weights: What of them is in the room at once.
        room: "host", or torch's name of a GPU.
        buffers: What steps work in at most.
        kv_cache: Its part, all of which is in use when the cache is full.
    """

    rank: int
    room: str
    layers: tuple[int, int]
    num_heads: int
    num_kv_heads: int
    weights: WeightBytes
    waiting: Mapping[str, int]
    resident_weights: int
    buffers: int
    kv_cache: int


@dataclass(frozen=True, slots=True)
class RoomUse:
    """One memory of this machine, in bytes.

    Attributes:
        processes: Of the interpreter and the libraries of all ranks there, with what gRPC holds; 0 on a GPU.
        needed: In all: what is resident once the KV cache is full, and every buffer was used.
        free: As the engine counts it. The libraries are not taken from it: this process has them too.
    """

    name: str
    processes: int
    needed: int
    free: int


@dataclass(frozen=True, slots=True)
class ContextFit:
    """How many requests of so many tokens the KV cache holds at once."""

    num_tokens: int
    kv_bytes: int
    num_requests: int


@dataclass(frozen=True, slots=True)
class Serving:
    """What it takes to serve it as the options say.

    Attributes:
        computed_by: Our kernels or torch.
        not_faster_because: Empty where nothing faster is known, or it was asked for.
        block_bytes: Of a KV block over all ranks.
        token_bytes: Of KV, of one token.
    """

    device: str
    dtype: str
    quantization: str
    computed_by: str
    not_faster_because: str
    kv_dtype: str
    kv_layout: str
    block_size: int
    block_bytes: int
    token_bytes: int
    ranks: tuple[RankUse, ...]
    rooms: tuple[RoomUse, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What fits.

    Attributes:
        problem: Why the engine would refuse; empty where it fits.
        remedies: What would make it fit, with what it comes to.
        max_model_len: Tokens of the longest request.
        full_context_kv_bytes: A KV cache that holds one request of as many tokens as the model was made for.
        possible_tp: Degrees among which its heads can be shared; --pp takes any number up to that of its layers.
    """

    fits: bool
    problem: str
    remedies: tuple[str, ...]
    num_blocks: int
    kv_cache_bytes: int
    max_model_len: int
    full_context_kv_bytes: int
    contexts: tuple[ContextFit, ...]
    possible_tp: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelReport:
    model: Identity
    source: Source
    serving: Serving
    verdict: Verdict


def inspect_model(config: EngineConfig, group: GroupConfig, process_bytes: int) -> ModelReport:
    """Reads headers, and says what serving the model would take of this machine.

    Args:
        process_bytes: Of a worker's process before it has a model.

    Raises:
        ConfigError: where the checkpoint is broken, or cannot be split so.
    """
    checkpoint = open_checkpoint(config.model)
    check_tensors(checkpoint, build_model(checkpoint.config))
    model = checkpoint.config
    fit = find_fit(config, group, model)
    return ModelReport(_identity(checkpoint), _source(checkpoint), _serving(fit, process_bytes), _verdict(fit, model))


def _identity(checkpoint: Checkpoint) -> Identity:
    model = checkpoint.config
    windows = Counter(window for window in model.windows if window is not None)
    return Identity(
        name=model.name,
        architecture=model.architecture,
        num_parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position=model.max_position,
        windows=tuple(Window(*entry) for entry in sorted(windows.items())),
        tied_output=model.tie_word_embeddings,
    )


def _source(checkpoint: Checkpoint) -> Source:
    tensors = list(checkpoint.tensors.values())
    encodings = tuple(
        Encoded(encoding, count, sum(tensor.num_bytes for tensor in tensors if tensor.encoding == encoding))
        for encoding, count in Counter(tensor.encoding for tensor in tensors).most_common()
    )
    return Source(
        format="GGUF" if checkpoint.files[0].suffix == ".gguf" else "safetensors",
        files=tuple(str(file) for file in checkpoint.files),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        encodings=encodings,
    )


def _serving(fit: Fit, process_bytes: int) -> Serving:
    config = fit.config
    ranks = tuple(
        RankUse(
            rank=placed.rank,
            room=placed.room.name,
            layers=(placed.shard.layers.start, placed.shard.layers.stop - 1),
            num_heads=len(placed.shard.heads),
            num_kv_heads=len(placed.shard.kv_heads),
            weights=placed.memory.weights,
            waiting=dict(placed.placement.waiting_bytes),
            resident_weights=placed.resident_bytes,
            buffers=placed.memory.buffers_bytes,
            kv_cache=(fit.size.num_blocks if fit.size else 0) * placed.block_bytes,
        )
        for placed in fit.ranks
    )
    rooms = []
    for room in fit.rooms:
        num_processes = sum(placed.room == room for placed in fit.ranks) if room.name == "host" else 0
        processes = num_processes * process_bytes
        rooms.append(RoomUse(room.name, processes, processes + fit.needed_bytes(room), room.free_bytes))
    return Serving(
        device=config.torch_device.type,
        dtype=config.dtype_name,
        quantization=config.quantization,
        computed_by=fit.choice.way.value,
        not_faster_because=fit.choice.because,
        kv_dtype=config.kv_dtype_name,
        kv_layout=fit.layout.name,
        block_size=config.block_size,
        block_bytes=fit.block_bytes,
        token_bytes=fit.block_bytes // config.block_size,
        ranks=ranks,
        rooms=tuple(rooms),
    )


def _verdict(fit: Fit, model: ModelConfig) -> Verdict:
    config, size = fit.config, fit.size
    num_blocks = size.num_blocks if size else 0
    max_model_len = size.max_model_len if size else 0
    contexts = sorted({tokens for tokens in (*_CONTEXTS, max_model_len) if 0 < tokens <= max_model_len})
    return Verdict(
        fits=size is not None,
        problem=fit.problem,
        remedies=() if size else tuple(remedies(fit, model)),
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * fit.block_bytes,
        max_model_len=max_model_len,
        full_context_kv_bytes=-(-model.max_position // config.block_size) * fit.block_bytes,
        contexts=tuple(_context(tokens, config.block_size, fit.block_bytes, num_blocks) for tokens in contexts),
        possible_tp=tuple(possible_tp(model)),
    )


def _context(num_tokens: int, block_size: int, block_bytes: int, num_blocks: int) -> ContextFit:
    blocks = -(-num_tokens // block_size)
    return ContextFit(num_tokens, blocks * block_bytes, num_blocks // blocks)
