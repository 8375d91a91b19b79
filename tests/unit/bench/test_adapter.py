import pytest

from bench.engine.peers.adapter import Sequence, full_batch_rate, measure

VOCAB_SIZE = 100


class SteppingEngine:
    """Its first token takes a second for each hundred prompt tokens, every later one a tenth of a second."""

    version = "1"

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Sequence]:
        self.prompts += prompts
        return [
            Sequence(prompt[-1], [len(prompt) / 100 + 0.1 * index for index in range(num_tokens)]) for prompt in prompts
        ]


def test_sequences_that_step_together() -> None:
    times = [0.5, 0.6, 0.7, 0.8]
    assert full_batch_rate([times] * 4) == pytest.approx(40)


def test_only_the_time_counts_in_which_all_decode() -> None:
    early = [0.0, 0.5, 1.0, 1.1, 1.2]  # slow until the other begins
    late = [1.0, 1.1, 1.2, 1.7]  # slow once the other has ended
    assert full_batch_rate([early, late]) == pytest.approx(20)


def test_the_order_within_a_step_does_not_matter() -> None:
    first = [1.0 + 0.1 * step for step in range(8)]
    second = [seen + 0.001 for seen in first]
    assert full_batch_rate([first, second]) == pytest.approx(20)


def test_sequences_that_never_decode_together_are_refused() -> None:
    with pytest.raises(ValueError, match="measure more tokens"):
        full_batch_rate([[0.0, 0.1], [0.5, 0.6]])


def test_prefill_counts_all_prompts() -> None:
    engine = SteppingEngine()
    reply = measure(engine, {"prefill": 50, "prompts": 3, "seed": 1}, VOCAB_SIZE)
    assert reply["tokens_per_s"] == pytest.approx(100)
    assert [len(prompt) for prompt in engine.prompts] == [50, 50, 50]
    assert reply["first_tokens"] == [prompt[-1] for prompt in engine.prompts]


def test_decode_leaves_out_the_prompts() -> None:
    engine = SteppingEngine()
    reply = measure(engine, {"decode": 4, "prompt": 30, "tokens": 6, "seed": 1}, VOCAB_SIZE)
    assert reply["tokens_per_s"] == pytest.approx(40)
    assert len(reply["first_tokens"]) == 4


def test_prompts_are_those_of_the_seed() -> None:
    first, same, other = SteppingEngine(), SteppingEngine(), SteppingEngine()
    measure(first, {"prefill": 20, "prompts": 2, "seed": 1}, VOCAB_SIZE)
    measure(same, {"prefill": 20, "prompts": 2, "seed": 1}, VOCAB_SIZE)
    measure(other, {"prefill": 20, "prompts": 2, "seed": 2}, VOCAB_SIZE)
    assert first.prompts == same.prompts
    assert first.prompts[0] != first.prompts[1]
    assert first.prompts != other.prompts
