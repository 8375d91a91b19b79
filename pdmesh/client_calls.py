"""The half of a client that does no I/O: requests made of arguments, and errors made of statuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

import grpc

from pdmesh.errors import InvalidRequestError, MeshError, UnavailableError
from pdmesh.sampling import SamplingParams
from pdmesh.status import from_rpc_error, is_ours
from pdmesh.v1 import common_pb2, inference_pb2

# How long a client waits for an answer that takes no computing.
CONTROL_TIMEOUT_S = 10.0

# What gRPC says where nobody listens, in every version so far.
_NO_CONNECTION = "failed to connect to all addresses"


class Message(TypedDict):
    """One turn of a chat; role is "system", "user" or "assistant"."""

    role: str
    content: str


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams, each optional. Without `seed` the router draws one."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_str_in_output: bool
    logit_bias: Mapping[int, float]
    logprobs: int
    prompt_logprobs: int
    n: int


class GenerateOptions(SamplingOptions, total=False):
    """What `generate` and `stream` take beside the text. Give exactly one of the text, `messages` and `tokens`.

    Keys:
        messages: A chat, rendered with the model's template.
        tokens: The prompt's token ids.
        model: The model's name; unset, the one that is served.
        sampling: All parameters at once; those given one by one come before it.
        priority: Higher runs first where work queues.
        cache_salt: Requests share cached prefixes only with requests of the same salt.
    """

    messages: Sequence[Message]
    tokens: Sequence[int]
    model: str
    sampling: SamplingParams
    priority: int
    cache_salt: str


def generate_request(text: str | None, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequestError for what no message can hold; the router checks the rest."""
    messages, tokens = options.get("messages"), options.get("tokens")
    if sum(given is not None for given in (text, messages, tokens)) != 1:
        raise InvalidRequestError("give exactly one of text, messages= and tokens=", stage="admission")
    with _unfit_values():
        request = inference_pb2.GenerateRequest(
            model=options.get("model", ""),
            sampling_params=_sampling_params(options),
            priority=options.get("priority", 0),
            cache_salt=options.get("cache_salt", ""),
        )
        if text is not None:
            request.text = text
        elif messages is not None:
            request.chat.CopyFrom(_chat(messages))
        else:
            request.tokens.CopyFrom(inference_pb2.TokenIds(ids=tokens))
    return request


def tokenize_request(text: str | None, messages: Sequence[Message] | None, model: str) -> inference_pb2.TokenizeRequest:
    if (text is None) == (messages is None):
        raise InvalidRequestError("give exactly one of text and messages=", stage="admission")
    with _unfit_values():
        request = inference_pb2.TokenizeRequest(model=model)
        if text is not None:
            request.text = text
        elif messages is not None:
            request.chat.CopyFrom(_chat(messages))
    return request


def detokenize_request(token_ids: Sequence[int], model: str) -> inference_pb2.DetokenizeRequest:
    with _unfit_values():
        return inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)


@contextlib.contextmanager
def mesh_errors(address: str) -> Iterator[None]:
    """Raises a failed call's status as the error of pdmesh.errors that it means."""
    try:
        yield
    except grpc.RpcError as error:
        raise _from_router(error, address) from error


def _from_router(error: grpc.RpcError, address: str) -> MeshError:
    # A router that cannot reach a worker may say so in the same words.
    if error.code() is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION in (error.details() or "") and not is_ours(error):
        return UnavailableError(
            f"nobody answers at {address}: is the router running there? `pdmesh up MODEL` starts a cluster",
            reason="NO_CONNECTION",
        )
    return from_rpc_error(error)


def _sampling_params(options: GenerateOptions) -> common_pb2.SamplingParams:
    sampling = options.get("sampling")
    params = sampling.to_pb() if sampling is not None else common_pb2.SamplingParams()
    given = {name: value for name, value in options.items() if name in SamplingOptions.__optional_keys__}
    for name in given:
        params.ClearField(name)  # type: ignore[arg-type]  # a merge would append to lists and maps
    params.MergeFrom(common_pb2.SamplingParams(**given))  # type: ignore[arg-type]
    return params


def _chat(messages: Sequence[Message]) -> inference_pb2.ChatMessages:
    return inference_pb2.ChatMessages(
        messages=[inference_pb2.ChatMessage(role=turn["role"], content=turn["content"]) for turn in messages]
    )


@contextlib.contextmanager
def _unfit_values() -> Iterator[None]:
    """A value of another type, or beyond the field's range, is the caller's; protobuf's message says which."""
    try:
        yield
    except KeyError as error:
        raise InvalidRequestError(f"a chat message lacks {error}: it needs role and content") from error
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"a value does not fit its field: {error}", stage="admission") from error
