"""What comes in, what is refused, and in which order it is looked at."""

from typing import Any

import pytest

from pdmesh.errors import InvalidRequestError, MeshError, NotFoundError, UnavailableError
from pdmesh.hashing import block_hashes, root_hash
from pdmesh.types import ModelInfo, PairingFacts, Role, WorkerInfo, WorkerState
from pdmesh.v1 import common_pb2, inference_pb2
from router.admission import Admission, AdmittedRequest, limits
from router.config import RouterConfig
from router.registry import WorkerRegistry
from router.text.tokenizer import TextModel, load_text_model
from tests.tiny_text import END_ID, VOCAB_SIZE, make_text_model, tiny_tokenizer

FACTS = PairingFacts("digest", "float32", "float32", 16, 2, 2, 8, "LKHTD")


class NeverTokenizes(TextModel):
    """Whoever is refused before tokenising does not notice."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("tokenised")

    def encode_chat(self, messages: object) -> list[int]:
        raise AssertionError("tokenised")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return load_text_model(str(make_text_model(tmp_path_factory.mktemp("models") / "tiny")))


def registry(*max_model_lens: int) -> WorkerRegistry:
    """A decode worker for each context length."""
    workers = WorkerRegistry("tiny", lambda worker_id: 0.0)
    for number, length in enumerate(max_model_lens):
        model = ModelInfo("tiny", "LlamaForCausalLM", VOCAB_SIZE, length)
        workers.worker_seen(
            WorkerInfo(f"d{number}", "1", Role.DECODE, WorkerState.READY, f"host:{number}", FACTS, model)
        )
    return workers


def admission(text: TextModel, *max_model_lens: int, **config: Any) -> Admission:
    return Admission(RouterConfig(model="tiny", **config), text, registry(*(max_model_lens or (128,))))


def chat(*messages: tuple[str, str]) -> inference_pb2.GenerateRequest:
    parts = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return inference_pb2.GenerateRequest(chat=inference_pb2.ChatMessages(messages=parts))


def tokens(*token_ids: int, **params: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenIds(ids=token_ids), sampling_params=common_pb2.SamplingParams(**params)
    )


async def test_a_chat_is_rendered_and_tokenised(text: TextModel) -> None:
    admitted = await admission(text).admit(chat(("user", "hello")))
    assert text.decode(admitted.prompt_token_ids) == "<|user|>hello<|end|><|assistant|>"
    assert admitted.model == "tiny"


async def test_long_input_gives_the_same_as_short(text: TextModel) -> None:
    """Past a size the work is done on a thread."""
    long = "hello " * 2000
    admitted = await admission(text, 20_000).admit(inference_pb2.GenerateRequest(text=long, cache_salt="tenant"))
    assert list(admitted.prompt_token_ids) == text.encode(long)
    assert admitted.hashes == {16: block_hashes(text.encode(long), 16, root_hash(b"tenant"))}


async def refusal(admission: Admission, request: inference_pb2.GenerateRequest) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await admission.admit(request)
    return caught.value


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (inference_pb2.GenerateRequest(), "EMPTY_INPUT"),
        (inference_pb2.GenerateRequest(chat=inference_pb2.ChatMessages()), "EMPTY_INPUT"),
        (inference_pb2.GenerateRequest(text="x" * 1001), "TEXT_TOO_LONG"),
        # Bytes count, not characters.
        (inference_pb2.GenerateRequest(text="é" * 501), "TEXT_TOO_LONG"),
        (chat(("user", "x" * 501), ("assistant", "x" * 500)), "TEXT_TOO_LONG"),
        (chat(*[("user", "x")] * 5), "TOO_MANY_MESSAGES"),
        (chat(("tool", "x")), "UNKNOWN_ROLE"),
        (inference_pb2.GenerateRequest(text="x", sampling_params=common_pb2.SamplingParams(top_p=2)),
         "INVALID_SAMPLING_PARAMS"),
        (inference_pb2.GenerateRequest(text="x", cache_salt="é" * 129), "CACHE_SALT_TOO_LONG"),
        (tokens(*range(128)), "PROMPT_TOO_LONG"),
        (tokens(1, VOCAB_SIZE), "TOKEN_NOT_IN_VOCABULARY"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
async def test_refused_before_anything_is_tokenised(request_: inference_pb2.GenerateRequest, reason: str) -> None:
    error = await refusal(
        admission(NeverTokenizes("tiny", tiny_tokenizer()), max_text_bytes=1000, max_messages=4), request_
    )
    assert isinstance(error, InvalidRequestError)
    assert error.reason == reason
    assert error.stage == "admission" or reason == "INVALID_SAMPLING_PARAMS"


async def test_the_limit_is_named(text: TextModel) -> None:
    error = await refusal(admission(text), inference_pb2.GenerateRequest(text="x" * 128))
    assert (error.reason, error.details) == ("PROMPT_TOO_LONG", {"num_tokens": "128", "limit": "127"})
    assert (await admission(text).admit(inference_pb2.GenerateRequest(text="x" * 127))).params.max_tokens == 1


async def test_the_model_is_looked_at_first(text: TextModel) -> None:
    error = await refusal(admission(text), inference_pb2.GenerateRequest(model="x", text="x" * 10_000_000))
    assert isinstance(error, NotFoundError)
    assert "served: tiny" in error.message


async def test_a_served_name_takes_the_place_of_the_models_own(text: TextModel) -> None:
    gate = admission(text, served_model_name="alias")
    assert (await gate.admit(inference_pb2.GenerateRequest(model="alias", text="x"))).model == "alias"
    assert isinstance(await refusal(gate, inference_pb2.GenerateRequest(model="tiny", text="x")), NotFoundError)


async def test_messages_that_the_template_refuses(text: TextModel) -> None:
    error = await refusal(admission(text), chat(("user", "a"), ("system", "b")))
    assert (error.reason, "system comes first" in error.message) == ("CHAT_TEMPLATE_REFUSED", True)


async def test_nobody_there(text: TextModel) -> None:
    gate = Admission(RouterConfig(model="tiny"), text, registry())
    assert isinstance(await refusal(gate, tokens(1)), UnavailableError)
    assert isinstance(await refusal(gate, tokens(1, n=99)), InvalidRequestError), "what can never succeed is said first"


async def test_the_shortest_context_of_all_workers_counts(text: TextModel) -> None:
    """A request may be resumed on any of them."""
    gate = admission(text, 128, 64, 256)
    assert (await refusal(gate, tokens(*[1] * 64))).details["limit"] == "63"
    assert (await gate.admit(tokens(1, max_tokens=1000))).params.max_tokens == 63


async def admitted(text: TextModel, **params: Any) -> AdmittedRequest:
    return await admission(text).admit(tokens(1, 2, 3, **params))


async def test_what_workers_are_told(text: TextModel) -> None:
    assert (await admitted(text)).params.max_tokens == 125
    assert (await admitted(text, max_tokens=5)).params.max_tokens == 5
    assert (await admitted(text, min_tokens=200)).params.min_tokens == 125
    assert (await admitted(text, stop_token_ids=[7, END_ID])).params.stop_token_ids == (7, END_ID)
    assert (await admitted(text, stop_token_ids=[7])).params.stop_token_ids == (7, END_ID)
    assert (await admitted(text, stop_token_ids=[7], ignore_eos=True)).params.stop_token_ids == (7,)
    with pytest.raises(InvalidRequestError, match="at most 64"):
        await admitted(text, stop_token_ids=range(64))


async def test_a_seed_is_kept_or_drawn(text: TextModel) -> None:
    assert (await admitted(text, seed=0)).params.seed == 0
    seeds = {(await admitted(text)).params.seed for _ in range(4)}
    assert len(seeds) == 4


async def test_limits_that_are_told_are_those_that_hold(text: TextModel) -> None:
    told = limits(RouterConfig(model="tiny", max_text_bytes=1000, max_messages=4))
    assert (told.max_text_bytes, told.max_messages) == (1000, 4)
    for field, most in (("n", told.max_n), ("logprobs", told.max_logprobs)):
        await admitted(text, **{field: most})
        with pytest.raises(InvalidRequestError):
            await admitted(text, **{field: most + 1})
    for stops in (["x"] * (told.max_stop_strings + 1), ["x" * (told.max_stop_string_bytes + 1)]):
        with pytest.raises(InvalidRequestError):
            await admitted(text, stop=stops)
