"""Who gets a prompt: tables."""

import pytest

from router.policy import LOAD_COST, Candidate, Choice, Weights, cost, rank

WEIGHTS = Weights()
PREFILLS = frozenset({"p0", "p1", "p2", "p3"})


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (Candidate("w"), 100),
        (Candidate("w", cached_tokens=64, pool_tokens=64), 36),
        # Where half of it is to be loaded first: dearer than at hand, cheaper than to compute.
        (Candidate("w", cached_tokens=64, pool_tokens=32), 36 + 32 * LOAD_COST),
        (Candidate("w", cached_tokens=64), 36 + 64 * LOAD_COST),
        # The last token is always computed: its logits are wanted.
        (Candidate("w", cached_tokens=112, pool_tokens=112), 1),
        (Candidate("w", queued_tokens=50), 150),
        (Candidate("w", num_requests=2), 132),
        (Candidate("w", used_blocks=50, num_blocks=100), 200),
        (Candidate("w", used_blocks=90, num_blocks=100), 1000),
        # Full: as with one free block, and no division by zero.
        (Candidate("w", used_blocks=100, num_blocks=100), 10_100),
        (Candidate("w", 64, 64, queued_tokens=10, num_requests=1, used_blocks=20, num_blocks=100), 36 + 10 + 16 + 25),
    ],
)  # fmt: skip
def test_cost(candidate: Candidate, expected: float) -> None:
    assert cost(candidate, 100, WEIGHTS) == pytest.approx(expected)


def test_weights_scale_their_terms() -> None:
    candidate = Candidate("w", queued_tokens=10, num_requests=3, used_blocks=50, num_blocks=100)
    assert cost(candidate, 100, Weights(queue=2, request=5, pressure=0.5)) == pytest.approx(100 + 20 + 15 + 50)


@pytest.mark.parametrize(
    ("candidates", "order"),
    [
        # Where the prompt lies.
        ([Candidate("a"), Candidate("b", cached_tokens=160)], "ba"),
        # Its nearest beginning, its longest beginning: 16 tokens to compute are more than 32 to load.
        ([Candidate("a", 160), Candidate("b", 160, 160)], "ba"),
        ([Candidate("a", 144, 144), Candidate("b", 160, 128)], "ba"),
        # Not at any price: 160 cached tokens do not outweigh 300 queued ones.
        ([Candidate("a"), Candidate("b", cached_tokens=160, queued_tokens=300)], "ab"),
        ([Candidate("a", queued_tokens=1), Candidate("b")], "ba"),
        ([Candidate("a", num_requests=1), Candidate("b")], "ba"),
        ([Candidate("a", used_blocks=5, num_blocks=9), Candidate("b", used_blocks=4, num_blocks=9)], "ba"),
        # All equal: whoever had none for longest.
        ([Candidate("a", turn=7), Candidate("b", turn=3), Candidate("c", turn=5)], "bca"),
        ([], ""),
    ],
)
def test_decode_workers_by_cost(candidates: list[Candidate], order: str) -> None:
    assert "".join(choice.decode_id for choice in rank(200, candidates, [], WEIGHTS, 64)) == order


@pytest.mark.parametrize(
    ("num_tokens", "decode", "prefill", "expected"),
    [
        # Nobody there, nobody that can pair: computed where it is decoded.
        (200, Candidate("d", pairs_with=PREFILLS), [], Choice("d", decode_tokens=200)),
        (200, Candidate("d"), [Candidate("p0")], Choice("d", decode_tokens=200)),
        # Short rests too, whether the prompt is short or cached.
        (64, Candidate("d", pairs_with=PREFILLS), [Candidate("p0")], Choice("d", decode_tokens=64)),
        (65, Candidate("d", pairs_with=PREFILLS), [Candidate("p0")], Choice("d", ("p0",), prefill_tokens=65)),
        (200, Candidate("d", cached_tokens=144, pairs_with=PREFILLS), [Candidate("p0")], Choice("d", decode_tokens=56)),
        # The best three, best first; tokens are counted for the first.
        (
            200,
            Candidate("d", pairs_with=PREFILLS),
            [
                Candidate("p0", queued_tokens=30),
                Candidate("p1"),
                Candidate("p2", cached_tokens=96),
                Candidate("p3", queued_tokens=20),
            ],
            Choice("d", ("p2", "p1", "p3"), prefill_tokens=104),
        ),
        # The best may be none of this decode worker's.
        (
            200,
            Candidate("d", pairs_with=frozenset({"p1"})),
            [Candidate("p0"), Candidate("p1", queued_tokens=500)],
            Choice("d", ("p1",), prefill_tokens=200),
        ),
    ],
)
def test_prefill_workers_of_a_choice(
    num_tokens: int, decode: Candidate, prefill: list[Candidate], expected: Choice
) -> None:
    assert rank(num_tokens, [decode], prefill, WEIGHTS, 64) == [expected]
