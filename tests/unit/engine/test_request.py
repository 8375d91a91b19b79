import pytest

from engine.api import EngineRequest
from engine.request import Request, RequestStatus, Stop, check_stop
from pdmesh.hashing import block_hashes, root_hash
from pdmesh.sampling import SamplingParams
from pdmesh.types import FinishReason


@pytest.mark.parametrize(
    ("sampling", "token_id", "num_output_tokens", "num_tokens", "stop"),
    [
        (SamplingParams(max_tokens=3), 7, 2, 12, None),
        (SamplingParams(max_tokens=3), 7, 3, 13, Stop(FinishReason.LENGTH)),
        (SamplingParams(stop_token_ids=(7,)), 7, 1, 11, Stop(FinishReason.STOP, 7)),
        (SamplingParams(stop_token_ids=(7,)), 8, 1, 11, None),
        # A stop token that is also the last one allowed counts as stop.
        (SamplingParams(stop_token_ids=(7,), max_tokens=1), 7, 1, 11, Stop(FinishReason.STOP, 7)),
        # min_tokens others must come before it.
        (SamplingParams(stop_token_ids=(7,), min_tokens=2), 7, 2, 12, None),
        (SamplingParams(stop_token_ids=(7,), min_tokens=2), 7, 3, 13, Stop(FinishReason.STOP, 7)),
        # The model's length ends what its max_tokens would allow.
        (SamplingParams(), 7, 10, 99, None),
        (SamplingParams(), 7, 10, 100, Stop(FinishReason.LENGTH)),
    ],
)
def test_check_stop(
    sampling: SamplingParams, token_id: int, num_output_tokens: int, num_tokens: int, stop: Stop | None
) -> None:
    found = check_stop(
        sampling, token_id=token_id, num_output_tokens=num_output_tokens, num_tokens=num_tokens, max_model_len=100
    )
    assert found == stop


def test_finished_is_one_comparison() -> None:
    over = [status for status in RequestStatus if status >= RequestStatus.FINISHED]
    assert over == [RequestStatus.FINISHED, RequestStatus.ABORTED, RequestStatus.FAILED]


def test_hashes_grow_with_the_tokens_and_equal_those_of_the_whole() -> None:
    request = Request(EngineRequest("r", tuple(range(10)), SamplingParams(), cache_salt=b"tenant"))
    request.extend_hashes(2, block_size=4)
    request.token_ids += [10, 11, 12]
    request.extend_hashes(3, block_size=4)
    assert request.block_hashes == block_hashes(range(13), 4, root_hash(b"tenant"))
