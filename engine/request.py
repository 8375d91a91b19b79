"""A request as the scheduler sees it: tokens known, tokens computed, blocks held; and when it stops."""

from dataclasses import dataclass
from enum import IntEnum

from engine.api import EngineRequest
from pdmesh.hashing import BlockHash, block_hash, root_hash
from pdmesh.sampling import SamplingParams
from pdmesh.types import FinishReason, TokenLogprob


class RequestStatus(IntEnum):
    """Ordered, so that `status >= RequestStatus.FINISHED` says that a request is over and holds nothing."""

    WAITING = 0
    # Has its blocks and a seat in the batch, or its blocks and waits for a seat.
    RUNNING = 1
    # Its first new token is out; its blocks are its holder's until released.
    HELD = 2
    FINISHED = 3
    ABORTED = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a request ends with its last token."""

    reason: FinishReason
    matched_token_id: int | None = None


def check_stop(
    sampling: SamplingParams,
    *,
    token_id: int,
    num_output_tokens: int,
    num_tokens: int,
    max_model_len: int,
) -> Stop | None:
    """Whether `token_id`, the last of `num_output_tokens` output tokens, ends its request.

    Args:
        num_output_tokens: Output tokens of all attempts, this one included.
        num_tokens: Prompt and output tokens.
        max_model_len: Most tokens that a request may have here.
    """
    # A stop token counts once min_tokens others came before it: the rule by which the sampler masks it, too.
    if num_output_tokens > sampling.min_tokens and token_id in sampling.stop_token_ids:
        return Stop(FinishReason.STOP, token_id)
    if num_output_tokens >= sampling.max_tokens or num_tokens >= max_model_len:
        return Stop(FinishReason.LENGTH)
    return None


class Request:
    """The one mutable record of a request; changed only by the scheduler.

    `num_computed_tokens` catches up with `num_tokens`; where it does, a token is sampled and `num_tokens` grows. So
    the KV of the last known token of a running request is never there yet.

    Attributes:
        source: What was asked.
        hold_blocks: Stop after the first new token and keep the blocks until released.
        order: Sorts requests: higher priority first, then earlier arrival. Set on arrival; preemption keeps it.
        stop_token_ids: Those of its sampling parameters.
        max_num_tokens: Tokens, prompt and output, with which it ends at the latest. Set on arrival.
        token_ids: Prompt and output.
        num_prefill_tokens: Tokens known when it was last queued; those after them are decoded.
        num_computed_tokens: Tokens whose KV lies in the blocks.
        block_table: Blocks held, first to last.
        block_hashes: Of the full blocks, as far as they were needed so far.
        num_committed_blocks: Leading blocks that were offered to the prefix index.
        num_cached_tokens: Tokens found in the prefix cache when it was first admitted.
        num_preemptions: How often its blocks were taken away.
        prompt_logprobs: Gathered over the prompt's chunks; None if not asked for, or delivered.
        seat: Row in the batch, while it has one; -1 otherwise.
        decoding: It has a seat, and one token to catch up with.
        computing: Hash of the block it fills next, if others may wait for that; see engine/prefix_waits.py.
        awaiting: Hash of the block that it waits for, while it does.
    """

    __slots__ = (
        "awaiting",
        "block_hashes",
        "block_table",
        "computing",
        "decoding",
        "hold_blocks",
        "max_num_tokens",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_preemptions",
        "num_prefill_tokens",
        "num_prompt_tokens",
        "order",
        "prompt_logprobs",
        "seat",
        "source",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, source: EngineRequest, *, hold_blocks: bool = False) -> None:
        self.source = source
        self.hold_blocks = hold_blocks
        self.order = (-source.priority, 0)
        self.status = RequestStatus.WAITING
        self.stop_token_ids = frozenset(source.sampling.stop_token_ids)
        self.max_num_tokens = len(source.prompt_token_ids) + source.sampling.max_tokens
        self.token_ids = [*source.prompt_token_ids, *source.output_token_ids]
        self.num_prompt_tokens = len(source.prompt_token_ids)
        self.num_prefill_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.num_preemptions = 0
        self.block_table: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.num_committed_blocks = 0
        # A request that goes on after an earlier attempt's output had its prompt's logprobs then.
        wants_prompt_logprobs = source.sampling.prompt_logprobs is not None and not source.output_token_ids
        self.prompt_logprobs: list[TokenLogprob] | None = [] if wants_prompt_logprobs else None
        self.seat = -1
        self.decoding = False
        self.computing: BlockHash | None = None
        self.awaiting: BlockHash | None = None

    def __repr__(self) -> str:
        done = f"{self.num_computed_tokens}/{self.num_tokens} tokens"
        return f"Request({self.source.request_id}, {self.status.name}, {done}, {len(self.block_table)} blocks)"

    @property
    def request_id(self) -> str:
        return self.source.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.source.sampling

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status >= RequestStatus.FINISHED

    def check_stop(self, max_model_len: int) -> Stop | None:
        """Whether the last output token ends this request. There must be one."""
        return check_stop(
            self.source.sampling,
            token_id=self.token_ids[-1],
            num_output_tokens=self.num_output_tokens,
            num_tokens=self.num_tokens,
            max_model_len=max_model_len,
        )

    def extend_hashes(self, num_blocks: int, block_size: int) -> None:
        """Brings `block_hashes` up to `num_blocks`, whose tokens must all be known."""
        hashes = self.block_hashes
        if len(hashes) >= num_blocks:
            return
        parent = hashes[-1] if hashes else root_hash(self.source.cache_salt)
        for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
            parent = block_hash(parent, self.token_ids[start : start + block_size])
            hashes.append(parent)
