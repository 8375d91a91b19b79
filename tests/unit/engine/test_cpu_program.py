"""The operations that programs of the CPU kernels are made of, each against torch in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from bench.engine.batches import plain_batch
from engine.attention import Scores
from engine.batch import Batch
from engine.cpu.angles import Angles
from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.executor import step_of
from engine.cpu.library import Activation, Decoder, Finish, Kernels, Step
from engine.cpu.packing import PACK, PackedMatrix, Packer
from engine.cpu.program import Program, RowNorm, Rows
from engine.rope import RopeConfig, angles, inverse_frequencies, rotate

MAX_TOKENS = 160
NUM_THREADS = 2

try:
    PATH = kernels_path(this_target())
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


class Trial:
    """A program of `dtype`, and matrices for it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.kernels = Kernels(PATH, dtype)
        self.program = Program(MAX_TOKENS, dtype)
        self.packer = Packer(self.kernels, {}, num_threads=2)

    def rows_of(self, values: torch.Tensor, dtype: torch.dtype | None = torch.float32) -> Rows:
        rows = self.program.rows(values.shape[1], dtype)
        rows.values[: len(values), : rows.width] = values
        return rows

    def matrix(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedMatrix:
        return self.packer.side_by_side([weight.to(self.dtype)], [bias])

    def run(self, num_tokens: int, positions: torch.Tensor | None = None) -> None:
        """Runs the program over the tokens, of which all are wanted, without a KV cache."""
        positions = torch.arange(num_tokens) if positions is None else positions
        step = Step(num_tokens=num_tokens, token_ids=positions.data_ptr(), positions=positions.data_ptr())
        operations = self.program.compile()
        self.kernels.run(Decoder(num_kv_heads=1, num_heads=1), step, operations, NUM_THREADS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    expected = expected.double()
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("width", [16, 40, 576])
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm(width: int, mean: float, has_bias: bool) -> None:
    trial, values = Trial(), normal(5, width) + mean
    scale, bias = normal(width, seed=1), normal(width, seed=2) if has_bias else None
    rows = trial.rows_of(values)
    # In place, as after an embedding or a layer.
    trial.program.normalize(rows, RowNorm(scale, 1e-5, bias, centred=True), rows, Finish.STORE)
    trial.run(5)
    wide = values.double()
    expected = F.layer_norm(wide, [width], scale.double(), None if bias is None else bias.double(), 1e-5)
    # Of what float32 keeps of the values themselves.
    assert_near(rows.values[:5, :width], expected, 2e-6 * (1 + mean / 10))
    assert not rows.values[:5, width:].any(), "what pads a row stays 0: products read it"


@pytest.mark.parametrize("finish", [Finish.NARROW, Finish.STORE, Finish.ADD])
@pytest.mark.parametrize("dtype", PACK)
def test_rms_norm_is_stored_or_added(finish: Finish, dtype: torch.dtype) -> None:
    trial, values, before, scale = Trial(dtype), normal(5, 40), normal(5, 40, seed=1), normal(40, seed=2)
    output = trial.rows_of(before, dtype if finish is Finish.NARROW else torch.float32)
    trial.program.normalize(trial.rows_of(values), RowNorm(scale, 1e-6), output, finish)
    trial.run(5)
    expected = F.rms_norm(values, [40], scale, 1e-6) + (before if finish is Finish.ADD else 0.0)
    if finish is Finish.NARROW:
        assert_near(output.values[:5, :40], expected, 2e-6 if dtype == torch.float32 else 2**-8)
    else:
        assert_near(output.values[:5, :40], expected)


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.SILU: F.silu,
    Activation.RELU: F.relu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation: Activation, gated: bool) -> None:
    trial = Trial()
    # Through the identity: all that a product may give, far beyond what models do.
    values = torch.cat((torch.linspace(-12, 12, 4000), torch.linspace(-1e-3, 1e-3, 88), normal(8) * 1e4)).view(-1, 64)
    gate = torch.eye(64)
    factor = gate.roll(1, 0)
    output = trial.program.rows(64)
    if gated:
        matrix = trial.packer.interleaved([gate, factor], [None, None])
        trial.program.project(trial.rows_of(values), matrix, output, Finish.ACTIVATE_MULTIPLY, activation)
    else:
        trial.program.project(trial.rows_of(values), trial.matrix(gate), output, Finish.ACTIVATE, activation)
    trial.run(len(values))
    wide, other = values.double(), values.double().roll(1, 1) if gated else torch.ones(64)
    error = (output.values[: len(values), :64] - ACTIVATIONS[activation](wide) * other).abs()
    assert (error <= 5e-7 * wide.abs() * other.abs()).all()


def test_a_product_of_a_number_that_is_none_shows() -> None:
    for activation in ACTIVATIONS:
        trial = Trial()
        output = trial.program.rows(32)
        source = trial.rows_of(torch.full((1, 32), torch.nan))
        trial.program.project(source, trial.matrix(torch.eye(32)), output, Finish.ACTIVATE, activation)
        trial.run(1)
        assert output.values[0, :32].isnan().all()


@pytest.mark.parametrize("dtype", PACK)
def test_learned_positions_and_a_scaled_embedding(dtype: torch.dtype) -> None:
    trial, table, places = Trial(dtype), normal(50, 40), normal(52, 40, seed=1)
    embedded = trial.program.rows(40, torch.float32)
    trial.program.embed(trial.matrix(table), 0, embedded, scale=3.0)
    trial.program.add_positions(places, 2, embedded)
    tokens = torch.tensor([7, 49, 0, 7])
    trial.run(4, tokens)
    expected = 3.0 * table.to(dtype)[tokens].float() + places.to(dtype)[tokens + 2].float()
    assert_near(embedded.values[:4, :40], expected, 1e-7)


def test_narrowed_rows_and_capped_logits() -> None:
    trial, values = Trial(torch.bfloat16), normal(3, 48) * 40
    rows, narrowed = trial.rows_of(values), trial.program.rows(48)
    trial.program.narrow(rows, narrowed)
    trial.program.cap(rows, 30.0)
    trial.run(3)
    assert torch.equal(narrowed.values[:3, :48], values.bfloat16())
    assert_near(rows.values[:3, :48], 30.0 * torch.tanh(values.double() / 30.0), 3e-7)


# Heads


class Heads:
    """A KV cache of one layer, of blocks as `plain_batch` takes them, and steps over it."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.shape = (num_heads, num_kv_heads, head_dim)
        self.pack = PACK[dtype]
        self.cache = torch.full((32, num_kv_heads, 1, 2, 16, head_dim), torch.nan, dtype=dtype)

    def run(self, trial: Trial, batch: Batch) -> None:
        num_heads, num_kv_heads, head_dim = self.shape
        block_stride, head_stride, layer_stride = self.cache.stride()[:3]
        decoder = Decoder(
            cache=self.cache.data_ptr(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=16,
            block_stride=block_stride,
            head_stride=head_stride,
            layer_stride=layer_stride,
        )
        step = step_of(batch)
        step.output_lens = batch.query_lens.ctypes.data
        operations = trial.program.compile()
        trial.kernels.run(decoder, step, operations, NUM_THREADS)

    def stored(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first tokens, [num_tokens, num_kv_heads, head_dim] each."""
        _, num_kv_heads, head_dim = self.shape
        tiles = self.cache[:, :, 0]
        keys = tiles[:, :, 0].reshape(32, num_kv_heads, head_dim // self.pack, 16, self.pack).permute(0, 3, 1, 2, 4)
        values = tiles[:, :, 1].reshape(32, num_kv_heads, 16 // self.pack, head_dim, self.pack).permute(0, 2, 4, 1, 3)
        return tuple(x.reshape(32 * 16, num_kv_heads, head_dim)[:num_tokens] for x in (keys, values))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", PACK)
@pytest.mark.parametrize(
    ("head_dim", "num_rotary_dims"),
    [(64, None), (80, None), (48, 18), (64, 16), (96, 24), (96, 72), (256, 2), (64, 0)],
)
def test_any_even_number_of_dimensions_turns(head_dim: int, num_rotary_dims: int | None, dtype: torch.dtype) -> None:
    num_tokens, width, num_heads, num_kv_heads = 40, 32, 4, 2
    trial, heads = Trial(dtype), Heads(num_heads, num_kv_heads, head_dim, dtype)
    rope = RopeConfig(num_rotary_dims=num_rotary_dims)
    weights = [normal(n * head_dim, width, seed=n + i).to(dtype) for i, n in enumerate((4, 2, 2))]
    table = Angles.of(rope, head_dim, 64) if num_rotary_dims != 0 else Angles.none(head_dim)
    rotary_dim = rope.rotary_dim(head_dim) or head_dim
    matrix = trial.packer.rotary(weights, [None] * 3, head_dim, rotary_dim)
    hidden = normal(num_tokens, width, seed=9)
    queries = trial.program.rows(num_heads * head_dim)
    trial.program.project_heads(trial.rows_of(hidden, dtype), matrix, queries, 0, table)
    heads.run(trial, plain_batch([num_tokens], [0]))
    q, k, v = (F.linear(hidden.to(dtype).float(), weight.float()).view(num_tokens, -1, head_dim) for weight in weights)
    if num_rotary_dims != 0:
        turns = angles(torch.arange(num_tokens), inverse_frequencies(rope, head_dim), 1.0)
        q, k = rotate(q, *turns), rotate(k, *turns)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    keys, values = heads.stored(num_tokens)
    assert_near(queries.values[:num_tokens, : num_heads * head_dim].view(num_tokens, -1, head_dim), q, tolerance)
    assert_near(keys, k, tolerance)
    assert_near(values, v, tolerance)


SLOPES = tuple(2.0 ** (-8 * (head + 1) / 6) for head in range(6))
RULES = {
    "scale": Scores(0.03),
    "cap": Scores(2.0, soft_cap=5.0),
    "slopes": Scores(0.25, slopes=SLOPES),
    "all": Scores(1.0, window=20, soft_cap=3.0, slopes=SLOPES),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_scores(rule: str, head_dim: int) -> None:
    num_heads, num_kv_heads, num_tokens, scores = 6, 2, 150, RULES[rule]
    q, k, v = (normal(num_tokens, n, head_dim, seed=n + i) for i, n in enumerate((6, 2, 2)))
    results = []
    for lens in ([150], [100, 49, 1]):
        # Keys and values come through an identity from rows; then attention, whole and in chunks.
        heads, attended = Heads(num_heads, num_kv_heads, head_dim, torch.float32), []
        begin = 0
        for count in lens:
            trial, rows = Trial(), slice(begin, begin + count)
            hidden = torch.cat([x[rows].reshape(count, -1) for x in (q, k, v)], dim=1)
            identity = torch.split(torch.eye(hidden.shape[1]), [n * head_dim for n in (num_heads, *[num_kv_heads] * 2)])
            matrix = trial.packer.rotary(identity, [None] * 3, head_dim, head_dim)
            queries, output = (trial.program.rows(num_heads * head_dim) for _ in range(2))
            trial.program.project_heads(trial.rows_of(hidden), matrix, queries, 0, Angles.none(head_dim))
            trial.program.attend(0, queries, output, scores)
            heads.run(trial, plain_batch([count], [begin]))
            attended.append(output.values[:count, : output.width].clone())
            begin += count
        results.append(torch.cat(attended))
    assert torch.equal(*results), "a row's bits do not depend on the chunk"
    expected = _attention(q.double(), k.double(), v.double(), scores)
    assert_near(results[0], expected.reshape(num_tokens, -1), 3e-6)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    num_tokens, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    scored = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scores.scale
    if scores.soft_cap is not None:
        scored = scores.soft_cap * torch.tanh(scored / scores.soft_cap)
    distance = torch.arange(num_tokens).unsqueeze(1) - torch.arange(num_tokens)
    if scores.slopes:
        scored -= torch.tensor(scores.slopes).view(-1, 1, 1) * distance
    hidden = (distance < 0) | (distance >= (scores.window or math.inf))
    weights = scored.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


# Mixtures of experts


class Mixture:
    """Random experts of 40 to 24 and back, and a router."""

    def __init__(self, dtype: torch.dtype, num_experts: int = 5) -> None:
        self.router = normal(num_experts, 40, seed=1).to(dtype)
        self.gates, self.ups, self.downs = (
            [normal(*shape, seed=100 * place + expert).to(dtype) for expert in range(num_experts)]
            for place, shape in enumerate(((24, 40), (24, 40), (40, 24)))
        )

    def run(self, hidden: torch.Tensor, before: torch.Tensor, num_chosen: int, *, whole: bool) -> torch.Tensor:
        """before + what the experts make of `hidden`, by the kernels."""
        dtype, num_tokens, num_experts = self.router.dtype, len(hidden), len(self.router)
        trial = Trial(dtype)
        program, residual = trial.program, trial.rows_of(before)
        logits = program.rows(num_experts, torch.float32)
        source = trial.rows_of(hidden, dtype)
        gathered, activated = (program.rows(width, per_token=num_chosen) for width in (40, 24))
        sums = program.rows(40, torch.float32, per_token=num_chosen)
        program.project(source, trial.matrix(self.router), logits, Finish.STORE)
        program.route(logits, num_experts, num_chosen, whole=whole)
        program.gather(source, gathered)
        gate_up = trial.packer.stacked(list(zip(self.gates, self.ups, strict=True)))
        program.project_experts(gathered, gate_up, num_experts, activated, Finish.ACTIVATE_MULTIPLY, Activation.SILU)
        program.project_experts(
            activated, trial.packer.stacked([[down] for down in self.downs]), num_experts, sums, Finish.STORE
        )
        program.combine_experts(sums, residual, Finish.ADD)
        trial.run(num_tokens)
        return residual.values[:num_tokens, :40].clone()

    def expected(self, hidden: torch.Tensor, num_chosen: int, *, whole: bool) -> torch.Tensor:
        wide = hidden.double()
        shares, chosen = F.linear(wide, self.router.double()).softmax(-1).topk(num_chosen)
        if whole:
            shares = shares / shares.sum(-1, keepdim=True)
        gates, ups, downs = (torch.stack(part).double() for part in (self.gates, self.ups, self.downs))
        activated = F.silu(torch.einsum("td,tend->ten", wide, gates[chosen])) * torch.einsum(
            "td,tend->ten", wide, ups[chosen]
        )
        return torch.einsum("ten,tedn,te->td", activated, downs[chosen], shares)


@pytest.mark.parametrize("dtype", PACK)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("num_chosen", [1, 2, 5])
def test_a_mixture_of_experts(dtype: torch.dtype, whole: bool, num_chosen: int) -> None:
    mixture, hidden, before = Mixture(dtype), normal(150, 40, seed=7).to(dtype), normal(150, 40, seed=8)
    result = mixture.run(hidden, before, num_chosen, whole=whole)
    expected = mixture.expected(hidden, num_chosen, whole=whole)
    assert_near(result - before, expected, 2e-6 if dtype == torch.float32 else 2e-2)
    # Whatever rows are beside it.
    for rows in (slice(0, 1), slice(40, 57)):
        assert torch.equal(mixture.run(hidden[rows], before[rows], num_chosen, whole=whole), result[rows])


def test_of_equal_experts_the_first_are_chosen() -> None:
    mixture = Mixture(torch.float32)
    mixture.router[:] = mixture.router[0]
    hidden, nothing = normal(20, 40), torch.zeros(20, 40)
    both = mixture.run(hidden, nothing, 2, whole=True)
    mixture.downs[2:] = [torch.full_like(down, 1e30) for down in mixture.downs[2:]]
    assert torch.equal(mixture.run(hidden, nothing, 2, whole=True), both)


def test_a_row_that_is_no_number_spoils_no_other() -> None:
    mixture, hidden, nothing = Mixture(torch.float32), normal(20, 40), torch.zeros(20, 40)
    clean = mixture.run(hidden, nothing, 2, whole=True)
    hidden[3] = torch.nan
    spoilt = mixture.run(hidden, nothing, 2, whole=True)
    assert spoilt[3].isnan().all()
    others = torch.arange(20) != 3
    assert torch.equal(spoilt[others], clean[others])
