"""What each rank has in memory: as the group says, and as the system does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.parallel.groups import Group
from bench.parallel.leading import Leading
from bench.parallel.models import cached_llama
from bench.parallel.proc import memory_of
from engine.model_config import ModelConfig

_NUM_SEQS = 8
_PROMPT_TOKENS = 96
# Prompts fill all but two blocks each, and steps reach the last: none ends, or waits for another's block, before.
_BLOCKS_EACH = 8
_STEPS = 18
_MAX_LEN = 256


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Of one rank, in bytes, every block of its KV cache written.

    Attributes:
        weights, kv: As the group says.
        runtime: In a process that has imported all that a rank does, and loaded nothing.
        loading: The most that it had in memory until it could serve, less `runtime`.
        share: Of the machine's memory: pages that processes share are divided among them (Pss).
        own: Of `share`, what is no file's: weights, buffers, heap; its KV and exchange.
    """

    weights: int
    kv: int
    runtime: int
    loading: int
    share: int
    own: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """The ranks of one group, and the largest file of the checkpoint that they loaded."""

    ranks: tuple[RankMemory, ...]
    file: int


def measure(model: ModelConfig, degrees: Sequence[int], dtype: str, say: Callable[[str], None]) -> dict[int, Footprint]:
    """By tensor-parallel degree."""
    directory = cached_llama(model, dtype)
    file_bytes = max(file.stat().st_size for file in directory.glob("*.safetensors"))
    found = {}
    for tp in degrees:
        say(f"{model.name}: what {tp} ranks have in memory")
        leading = Leading(
            tp=tp,
            model=str(directory),
            dtype=dtype,
            prompt_tokens=_PROMPT_TOKENS,
            max_num_seqs=_NUM_SEQS,
            num_blocks=_NUM_SEQS * _BLOCKS_EACH,
            max_len=_MAX_LEN,
        )
        found[tp] = Footprint(_ranks(leading), file_bytes)
    return found


def _ranks(leading: Leading) -> tuple[RankMemory, ...]:
    with Group(leading) as group:
        group.wait_ready()
        loading = [memory_of(rank["pid"]).most_resident - group.before_bytes for rank in group.ranks]
        group.decode(_NUM_SEQS)
        group.begin(_STEPS)
        group.seconds()
        now = [memory_of(rank["pid"]) for rank in group.ranks]
        return tuple(
            RankMemory(
                weights=rank["weight_bytes"],
                kv=rank["kv_bytes"],
                runtime=group.before_bytes,
                loading=most,
                share=memory.share,
                own=memory.anonymous + memory.shared,
            )
            for rank, most, memory in zip(group.ranks, loading, now, strict=True)
        )
