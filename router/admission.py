"""What may come in: every limit is checked before anything is allocated for a request, the cheapest checks first.

model -> size and shape of the input -> sampling values -> anybody there? -> tokens -> length of the prompt
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pdmesh import sampling
from pdmesh.errors import InvalidRequestError, NotFoundError, UnavailableError
from pdmesh.hashing import BlockHash, block_hashes, root_hash
from pdmesh.sampling import SamplingParams
from pdmesh.types import ModelInfo
from pdmesh.v1 import common_pb2, inference_pb2
from router.config import RouterConfig
from router.registry import WorkerRegistry
from router.text.tokenizer import TextModel

T = TypeVar("T")

ROLES = ("system", "user", "assistant")
MAX_CACHE_SALT_BYTES = 256
# Shorter inputs take less time than the way to a thread and back is worth.
_THREAD_FROM_CHARACTERS = 4096

TextInput = inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request that can succeed, ready to be given to workers.

    Attributes:
        accepted_at: When the router took it, by the monotonic clock.
        model: Name by which the client knows the model.
        prompt_token_ids: Tokenised once, here.
        hashes: Of the prompt's full blocks, by block size; hashed once, here.
        params: For workers: seed drawn, max_tokens clipped to the context, the model's end tokens among the stop
            tokens.
    """

    request_id: str
    accepted_at: float
    model: str
    prompt_token_ids: Sequence[int]
    hashes: dict[int, list[BlockHash]]
    params: SamplingParams
    priority: int
    cache_salt: bytes


class Admission:
    """See the module. Holds nothing of any request.

    Args:
        text: The model's text side.
        registry: Who lives, and what context length they serve.
    """

    def __init__(self, config: RouterConfig, text: TextModel, registry: WorkerRegistry) -> None:
        self._config = config
        self._text = text
        self._registry = registry
        self._model_name = config.served_model_name or text.name

    async def admit(self, request: inference_pb2.GenerateRequest) -> AdmittedRequest:
        """Raises InvalidRequestError, NotFoundError, or UnavailableError where no decode worker takes requests."""
        accepted_at = time.monotonic()
        self.check_model(request.model)
        self._check_input(request)
        cache_salt = request.cache_salt.encode()
        if len(cache_salt) > MAX_CACHE_SALT_BYTES:
            raise _too_large("CACHE_SALT_TOO_LONG", "cache_salt", len(cache_salt), MAX_CACHE_SALT_BYTES, "bytes")
        model = self.model()
        params = _params(request.sampling_params, model.vocab_size if model else self._text.num_tokens)
        if model is None:
            raise UnavailableError(
                f"no decode worker for {self._model_name} takes requests now; try again when one is ready",
                reason="NO_DECODE_WORKER",
                stage="routing",
            )
        max_prompt = model.max_model_len - 1
        if request.HasField("tokens"):
            _check_token_ids(request.tokens.ids, max_prompt, model)
        block_sizes = self._registry.block_sizes()

        def prepare() -> tuple[Sequence[int], dict[int, list[BlockHash]]]:
            token_ids = self._token_ids(request)
            if len(token_ids) > max_prompt:
                raise _prompt_too_long(len(token_ids), model)
            root = root_hash(cache_salt)
            return token_ids, {size: block_hashes(token_ids, size, root) for size in block_sizes}

        prompt, hashes = await _off_loop(prepare, _length(request))
        return AdmittedRequest(
            request_id=secrets.token_hex(8),
            accepted_at=accepted_at,
            model=self._model_name,
            prompt_token_ids=prompt,
            hashes=hashes,
            params=self._for_workers(params, request.sampling_params, len(prompt), model),
            priority=request.priority,
            cache_salt=cache_salt,
        )

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> Sequence[int]:
        """The tokens that `Generate` would make of the same input. Raises InvalidRequestError, NotFoundError."""
        self.check_model(request.model)
        self._check_input(request)
        return await _off_loop(lambda: self._token_ids(request), _length(request))

    async def detokenize(self, request: inference_pb2.DetokenizeRequest) -> str:
        """Raises InvalidRequestError, NotFoundError."""
        self.check_model(request.model)
        token_ids = request.token_ids
        if len(token_ids) > self._config.max_text_bytes:
            raise _too_large("TOO_MANY_TOKENS", "token_ids", len(token_ids), self._config.max_text_bytes, "tokens")
        _check_vocabulary(token_ids, self._text.num_tokens)
        return await _off_loop(lambda: self._text.decode(token_ids), len(token_ids))

    def check_model(self, name: str) -> None:
        """Raises NotFoundError for a name that is not served; an empty one means the one that is."""
        if name and name != self._model_name:
            raise NotFoundError(
                f"model {name!r} is not served here; served: {self._model_name}",
                reason="MODEL_NOT_FOUND",
                stage="admission",
                details={"model": name, "served": self._model_name},
            )

    def model(self) -> ModelInfo | None:
        """The served model under its served name; None while no decode worker takes requests.

        Where workers differ in how long a context they hold, the shortest counts: each request can go to, and be
        resumed on, any of them.
        """
        models = self._registry.models()
        if not models:
            return None
        shortest = min(models, key=lambda model: model.max_model_len)
        return replace(shortest, name=self._model_name)

    def _check_input(self, request: TextInput) -> None:
        kind = request.WhichOneof("input")
        if kind == "text":
            texts = [request.text]
        elif kind == "chat":
            messages = request.chat.messages
            if len(messages) > self._config.max_messages:
                raise _too_large("TOO_MANY_MESSAGES", "chat", len(messages), self._config.max_messages, "messages")
            _check_roles(messages)
            texts = [message.content for message in messages]
        else:
            texts = []
        limit = self._config.max_text_bytes
        # Characters first: counting them costs nothing, and there are no more of them than bytes.
        size = sum(map(len, texts))
        if size <= limit:
            size = sum(len(text.encode()) for text in texts)
        if size > limit:
            raise _too_large("TEXT_TOO_LONG", "text", size, limit, "bytes")
        num_token_ids = len(request.tokens.ids) if isinstance(request, inference_pb2.GenerateRequest) else 0
        if (not texts and not num_token_ids) or (kind == "text" and not size):
            raise InvalidRequestError(
                "the input is empty: give text, chat messages or token ids", reason="EMPTY_INPUT", stage="admission"
            )

    def _token_ids(self, request: TextInput) -> Sequence[int]:
        kind = request.WhichOneof("input")
        if kind == "text":
            return self._text.encode(request.text)
        if kind == "chat":
            return self._text.encode_chat([{"role": m.role, "content": m.content} for m in request.chat.messages])
        assert isinstance(request, inference_pb2.GenerateRequest)
        return list(request.tokens.ids)

    def _for_workers(
        self, params: SamplingParams, asked: common_pb2.SamplingParams, num_prompt: int, model: ModelInfo
    ) -> SamplingParams:
        max_tokens = min(params.max_tokens, model.max_model_len - num_prompt)
        eos = () if params.ignore_eos else (i for i in self._text.eos_token_ids if i < model.vocab_size)
        stop_token_ids = tuple(dict.fromkeys([*params.stop_token_ids, *eos]))
        if len(stop_token_ids) > sampling.MAX_STOP_TOKEN_IDS:
            raise _too_large(
                "INVALID_SAMPLING_PARAMS",
                "stop_token_ids with the model's own",
                len(stop_token_ids),
                sampling.MAX_STOP_TOKEN_IDS,
                "ids",
            )
        return replace(
            params,
            seed=params.seed if asked.HasField("seed") else secrets.randbits(64),
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            stop_token_ids=stop_token_ids,
        )


def limits(config: RouterConfig) -> inference_pb2.Limits:
    """The limits that this module holds requests to."""
    return inference_pb2.Limits(
        max_text_bytes=config.max_text_bytes,
        max_messages=config.max_messages,
        max_n=sampling.MAX_N,
        max_logprobs=sampling.MAX_LOGPROBS,
        max_stop_strings=sampling.MAX_STOP_STRINGS,
        max_stop_string_bytes=sampling.MAX_STOP_STRING_BYTES,
        max_logit_bias=sampling.MAX_LOGIT_BIAS,
    )


async def _off_loop(work: Callable[[], T], length: int) -> T:
    """Runs work over `length` characters or tokens where it does not hold up other requests."""
    return work() if length < _THREAD_FROM_CHARACTERS else await asyncio.to_thread(work)


def _length(request: TextInput) -> int:
    kind = request.WhichOneof("input")
    if kind == "text":
        return len(request.text)
    if kind == "chat":
        return sum(len(message.content) for message in request.chat.messages)
    assert isinstance(request, inference_pb2.GenerateRequest)
    return len(request.tokens.ids)


def _params(message: common_pb2.SamplingParams, vocab_size: int) -> SamplingParams:
    params = SamplingParams.from_pb(message)
    params.validate(vocab_size)
    return params


def _check_roles(messages: Sequence[inference_pb2.ChatMessage]) -> None:
    for message in messages:
        if message.role not in ROLES:
            raise InvalidRequestError(
                f"role is {message.role[:64]!r}: must be one of {', '.join(ROLES)}",
                reason="UNKNOWN_ROLE",
                stage="admission",
            )


def _check_token_ids(token_ids: Sequence[int], max_prompt: int, model: ModelInfo) -> None:
    if len(token_ids) > max_prompt:
        raise _prompt_too_long(len(token_ids), model)
    _check_vocabulary(token_ids, model.vocab_size)


def _check_vocabulary(token_ids: Sequence[int], vocab_size: int) -> None:
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequestError(
            f"token id {largest} is not in the vocabulary: ids go from 0 to {vocab_size - 1}",
            reason="TOKEN_NOT_IN_VOCABULARY",
            stage="admission",
            details={"limit": str(vocab_size - 1)},
        )


def _prompt_too_long(num_tokens: int, model: ModelInfo) -> InvalidRequestError:
    limit = model.max_model_len - 1
    return InvalidRequestError(
        f"the prompt has {num_tokens} tokens; {model.name} takes at most {limit} "
        f"(its context of {model.max_model_len} must leave room for one token of output)",
        reason="PROMPT_TOO_LONG",
        stage="admission",
        details={"num_tokens": str(num_tokens), "limit": str(limit)},
    )


def _too_large(reason: str, what: str, size: int, limit: int, unit: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{what} has {size} {unit}: at most {limit} are taken",
        reason=reason,
        stage="admission",
        details={"size": str(size), "limit": str(limit)},
    )
