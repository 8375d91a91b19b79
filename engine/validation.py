"""What a request must be, to run on an engine at all; checked before anything is allocated for it."""

from engine.api import EngineRequest
from pdmesh.errors import InvalidRequestError


def validate_request(request: EngineRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Raises InvalidRequestError naming the limit."""
    num_prompt_tokens = len(request.prompt_token_ids)
    if not num_prompt_tokens:
        raise InvalidRequestError("the prompt is empty: send at least one token", reason="EMPTY_PROMPT")
    num_tokens = num_prompt_tokens + len(request.output_token_ids)
    # A prompt must leave room for a token; what an earlier attempt generated may have filled it.
    if num_prompt_tokens >= max_model_len or num_tokens > max_model_len:
        raise InvalidRequestError(
            f"the prompt has {num_prompt_tokens} tokens and {len(request.output_token_ids)} of output: "
            f"this engine takes {max_model_len} in all, the next one included",
            reason="PROMPT_TOO_LONG",
            details={"limit": str(max_model_len), "num_tokens": str(num_tokens)},
        )
    for token_ids in (request.prompt_token_ids, request.output_token_ids):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            raise InvalidRequestError(
                f"a token id is outside the vocabulary: ids go from 0 to {vocab_size - 1}",
                reason="TOKEN_OUT_OF_RANGE",
                details={"limit": str(vocab_size)},
            )
    request.sampling.validate(vocab_size)
