"""The sampling kernels against torch's operations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.counter_rng import stream_key
from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.sampling import CpuSampling
from engine.sampling_ops import NEVER, Draws
from engine.torch_sampling import TorchSampling
from pdmesh.errors import InternalError

MAX_VOCAB = 6000
TORCH = TorchSampling()


@pytest.fixture(scope="module")
def kernels() -> CpuSampling:
    try:
        path = kernels_path(this_target())
    except BuildError as error:
        pytest.skip(str(error))
    return CpuSampling(path, vocab_size=MAX_VOCAB, num_threads=2)


@st.composite
def logit_rows(draw: st.DrawFn) -> torch.Tensor:
    """Rows as models make them, flat ones, steep ones, with ties and masked tokens; of all lengths modulo vectors."""
    num_rows, vocab_size = draw(st.integers(1, 5)), draw(st.integers(1, 200) | st.integers(1000, MAX_VOCAB))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 4.0, 30.0]))
    rows = torch.randn(num_rows, vocab_size, generator=generator) * spread + draw(st.floats(-50, 50))
    if draw(st.booleans()):
        rows = rows.round()
    if draw(st.booleans()):
        masked = torch.rand(rows.shape, generator=generator) < 0.3
        masked[:, draw(st.integers(0, vocab_size - 1))] = False
        rows.masked_fill_(masked, float("-inf"))
    return rows


@st.composite
def draws_of(draw: st.DrawFn, num_rows: int) -> Draws:
    """For some of the rows, in any order, each with parameters of its own."""
    rows = draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=6))

    def each(values: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(values, min_size=len(rows), max_size=len(rows)))

    seeds, indices = each(st.integers(0, 2**64 - 1)), each(st.integers(0, 5000))
    return Draws(
        rows=np.array(rows, np.int64),
        temperatures=np.array(each(st.sampled_from([1e-6, 0.1, 0.7, 1.0, 2.5, 100.0])), np.float32),
        floors=np.array(each(st.sampled_from([-NEVER, -NEVER, -3.0, -0.1, 0.0])), np.float32),
        top_ks=np.array(each(st.sampled_from([0, 0, 1, 2, 40, 900, 10**6])), np.int64),
        top_ps=np.array(each(st.sampled_from([1.0, 1.0, 1e-9, 0.1, 0.5, 0.9, 0.999])), np.float64),
        keys=np.array([stream_key(int(seed), 0) for seed in seeds], np.int64),
        counters=np.array(indices, np.int64) << 32,
    )


def strided(rows: torch.Tensor) -> torch.Tensor:
    """The same values, in rows that lie further apart."""
    wide = torch.full((len(rows), rows.shape[1] + 7), torch.nan)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


@settings(max_examples=80, deadline=None)
@given(rows=logit_rows())
def test_the_likeliest_are_the_first_of_the_greatest(kernels: CpuSampling, rows: torch.Tensor) -> None:
    expected = [row.index(max(row)) for row in rows.tolist()]
    assert kernels.likeliest(rows).tolist() == expected
    assert kernels.likeliest(strided(rows)).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=logit_rows())
def test_draws_are_those_of_torch(kernels: CpuSampling, data: st.DataObject, rows: torch.Tensor) -> None:
    draws = data.draw(draws_of(len(rows)))
    drawn = kernels.draw(strided(rows), draws)
    # Sums that end next to top_p may end on either side of it.
    allowed = [TORCH.draw(rows, replace(draws, top_ps=draws.top_ps * nearly)) for nearly in (1.0, 1 - 1e-6, 1 + 1e-6)]
    for index, token_id in enumerate(drawn.tolist()):
        assert token_id in [int(of[index]) for of in allowed]


@settings(max_examples=60, deadline=None)
@given(rows=logit_rows(), data=st.data())
def test_logprobs_are_those_of_torch(kernels: CpuSampling, rows: torch.Tensor, data: st.DataObject) -> None:
    token_ids = [data.draw(st.integers(0, rows.shape[1] - 1)) for _ in rows]
    num_top = data.draw(st.sampled_from([0, 1, 5, 20]))
    found = kernels.logprobs(strided(rows), token_ids, num_top)
    expected = TORCH.logprobs(rows, token_ids, num_top)
    for row, ours, theirs in zip(rows.tolist(), found, expected, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-6, abs=1e-5)
        # Of tokens that tie, the first: torch leaves that open.
        likeliest = sorted(range(len(row)), key=lambda token_id: (-row[token_id], token_id))[:num_top]
        assert [token_id for token_id, _ in ours.top] == likeliest
        values = [value for _, value in ours.top]
        assert values == pytest.approx([value for _, value in theirs.top], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("place", [0, 63, 64, 1023, 1024, 1050])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(kernels: CpuSampling, place: int, bad: float) -> None:
    rows = torch.zeros(3, 1051)
    rows[1, place] = bad
    with pytest.raises(InternalError, match="not finite"):
        kernels.likeliest(rows)
    with pytest.raises(InternalError, match="not finite"):
        kernels.likeliest(torch.full((1, 70), float("-inf")))
