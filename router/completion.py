"""One completion as the client has it: its tokens, its text, and how it ended.

The worker sends tokens with their absolute index. Whatever worker they come from, each index passes here once: one that
the client has is dropped, one that skips an index is an error of that worker.
"""

from collections.abc import Sequence

from pdmesh.errors import UnavailableError
from pdmesh.sampling import SamplingParams
from pdmesh.v1 import common_pb2, decode_pb2, inference_pb2
from router.text.detokenizer import Detokenizer, TokenBytes
from router.text.stop_strings import StopMatcher, StopStrings


class Completion:
    """See the module.

    Args:
        index: Which of the request's completions.
        num_prompt_tokens: For usage.
        params: As the workers have them.
        stops: Stop strings, shared by the request's completions; None where there are none.

    Attributes:
        token_ids: All that was delivered.
        finish_reason: UNSPECIFIED until it ended.
    """

    __slots__ = (
        "_detokenizer",
        "_matcher",
        "_num_cached",
        "_num_prompt",
        "_params",
        "_stop_ids",
        "finish_reason",
        "index",
        "matched_stop_str",
        "matched_token_id",
        "token_ids",
    )

    def __init__(
        self, index: int, num_prompt_tokens: int, params: SamplingParams, stops: StopStrings | None, tokens: TokenBytes
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED
        self.matched_token_id: int | None = None
        self.matched_stop_str: str | None = None
        self._num_prompt = num_prompt_tokens
        self._num_cached = 0
        self._params = params
        self._stop_ids = frozenset(params.stop_token_ids)
        self._detokenizer = Detokenizer(tokens)
        self._matcher = StopMatcher(stops, include=params.include_stop_str_in_output) if stops else None

    @property
    def finished(self) -> bool:
        return self.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED

    def usage(self) -> common_pb2.Usage:
        return common_pb2.Usage(
            prompt_tokens=self._num_prompt, completion_tokens=len(self.token_ids), cached_tokens=self._num_cached
        )

    def accept(self, tokens: decode_pb2.DecodeTokens) -> inference_pb2.GenerateChunk | None:
        """What is new in `tokens` for the client, if anything. May end the completion, by a stop string.

        Raises UnavailableError where tokens are missing in between: whoever sent them is not to be believed.
        """
        if self.finished:
            return None
        have = len(self.token_ids)
        known = have - tokens.first_token_index
        if known < 0:
            raise UnavailableError(
                f"token {tokens.first_token_index} came where token {have} was due", reason="TOKEN_GAP", stage="decode"
            )
        token_ids = tokens.token_ids[known:] if known else tokens.token_ids
        if not token_ids:
            return None
        if not have:
            self._num_cached = tokens.cached_tokens
        num_new, text = self._advance(token_ids)
        chunk = inference_pb2.GenerateChunk(
            index=self.index,
            first_token_index=have,
            token_ids=token_ids[:num_new],
            text=text,
            usage=self.usage(),
        )
        if tokens.logprobs:
            chunk.logprobs.extend(tokens.logprobs[known : known + num_new])
        if tokens.prompt_logprobs and not have and not self.index:
            chunk.prompt_logprobs.extend(tokens.prompt_logprobs)
        return chunk

    def end(self, reason: common_pb2.FinishReason.ValueType, matched_token_id: int | None) -> None:
        """The worker says that it is over."""
        self.finish_reason = reason
        self.matched_token_id = matched_token_id

    def end_if_due(self) -> None:
        """Ends it by its tokens alone, where a worker was lost between the last token and word of the end."""
        if self.finished or not self.token_ids:
            return
        last = self.token_ids[-1]
        if self._is_stop(last, len(self.token_ids) - 1):
            self.end(common_pb2.FINISH_REASON_STOP, last)
        elif len(self.token_ids) >= self._params.max_tokens:
            self.end(common_pb2.FINISH_REASON_LENGTH, None)

    def rest(self) -> inference_pb2.GenerateChunk | None:
        """Text that was held back, once the completion has ended."""
        if self.matched_stop_str is not None:
            return None
        text = (self._matcher.flush() if self._matcher else "") + self._detokenizer.flush()
        if not text:
            return None
        return inference_pb2.GenerateChunk(
            index=self.index, first_token_index=len(self.token_ids), text=text, usage=self.usage()
        )

    def complete(self, report: inference_pb2.RequestReport) -> inference_pb2.GenerateComplete:
        complete = inference_pb2.GenerateComplete(
            index=self.index, finish_reason=self.finish_reason, usage=self.usage(), report=report
        )
        if self.matched_token_id is not None:
            complete.matched_token_id = self.matched_token_id
        if self.matched_stop_str is not None:
            complete.matched_stop_str = self.matched_stop_str
        return complete

    def resume_point(self) -> decode_pb2.ResumePoint:
        return decode_pb2.ResumePoint(index=self.index, output_token_ids=self.token_ids, finished=self.finished)

    def _advance(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """Takes tokens; returns how many belong to the completion, and the text that is certain by now."""
        if self._matcher is not None:
            return self._advance_matching(token_ids, self._matcher)
        first = len(self.token_ids)
        self.token_ids.extend(token_ids)
        # A stop token ends the stream, so it can only be the last one.
        if self._is_stop(token_ids[-1], first + len(token_ids) - 1):
            return len(token_ids), self._detokenizer.push(token_ids[:-1])
        return len(token_ids), self._detokenizer.push(token_ids)

    def _advance_matching(self, token_ids: Sequence[int], matcher: StopMatcher) -> tuple[int, str]:
        pieces = []
        for count, token_id in enumerate(token_ids, 1):
            place = len(self.token_ids)
            self.token_ids.append(token_id)
            piece = "" if self._is_stop(token_id, place) else self._detokenizer.push((token_id,))
            if place < self._params.min_tokens:
                pieces.append(piece)
                continue
            pieces.append(matcher.push(piece))
            if matcher.matched is not None:
                self.finish_reason = common_pb2.FINISH_REASON_STOP
                self.matched_stop_str = matcher.matched
                return count, "".join(pieces)
        return len(token_ids), "".join(pieces)

    def _is_stop(self, token_id: int, place: int) -> bool:
        return token_id in self._stop_ids and place >= self._params.min_tokens
