"""Decoders of every part that there is: on the kernels they compute what they do in torch, whole and over ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from engine.batch import Batch
from engine.cpu.build import BuildError, kernels_path, this_target
from engine.cpu.executor import CpuExecutor, SumsBetween, cpu_layout
from engine.cpu.library import Kernels
from engine.decoder_config import (
    AlibiPositions,
    AttentionConfig,
    DecoderLayers,
    EmbeddingConfig,
    ExpertsConfig,
    LearnedPositions,
    MlpConfig,
    NormConfig,
    RotaryPositions,
    turns_by,
)
from engine.executor import ModelExecutor
from engine.kv_cache import KVCache, KVLayout
from engine.loader import LoadedModel
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.parallel.shard import Shard, shard_of
from engine.rope import RopeConfig
from engine.weights.checkpoint import Part
from tests.texts import Texts, packed_for, random_text

try:
    PATH = kernels_path(this_target())
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

BASE = ModelConfig(
    name="tiny",
    architecture="LlamaForCausalLM",
    vocab_size=320,
    hidden_size=72,
    intermediate_size=104,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=48,
    max_position=256,
    tie_word_embeddings=False,
    eos_token_ids=(2,),
    bos_token_id=1,
    layers=DecoderLayers(NormConfig("rms", 1e-6), turns_by(RopeConfig())),
)
LAYER_NORM = NormConfig("layer", 1e-5)
BIASES = AttentionConfig(qkv_bias=True, output_bias=True)
# A quarter of each head, and of 40 dimensions an odd number of pairs.
PARTIAL = RopeConfig(num_rotary_dims=18)
EXPERTS = ExpertsConfig(num_experts=5, num_per_token=2, renormalise=True, intermediate_size=40)

DECODERS = {
    "gpt2": replace(
        BASE,
        num_kv_heads=4,
        tie_word_embeddings=True,
        layers=DecoderLayers(LAYER_NORM, LearnedPositions(), BIASES, MlpConfig("gelu_tanh", gated=False, bias=True)),
    ),
    "opt-post": replace(
        BASE,
        tie_word_embeddings=True,
        layers=DecoderLayers(
            LAYER_NORM,
            LearnedPositions(offset=2),
            BIASES,
            MlpConfig("relu", gated=False, bias=True),
            embedding=EmbeddingConfig(size=40),
            residual="post",
            final_norm=False,
        ),
    ),
    "bloom": replace(
        BASE,
        num_heads=6,
        num_kv_heads=6,
        layers=DecoderLayers(
            LAYER_NORM,
            AlibiPositions(),
            BIASES,
            MlpConfig("gelu_tanh", gated=False, bias=True),
            embedding=EmbeddingConfig(norm=True),
        ),
    ),
    "gpt-neox": replace(
        BASE,
        layers=DecoderLayers(
            LAYER_NORM,
            turns_by(PARTIAL),
            BIASES,
            MlpConfig("gelu", gated=False, bias=True),
            residual="parallel",
        ),
    ),
    "gemma": replace(
        BASE,
        tie_word_embeddings=True,
        windows=(20, None, 20, None),
        layers=DecoderLayers(
            NormConfig("rms", 1e-6, from_one=True),
            RotaryPositions((RopeConfig(), RopeConfig(theta=1e6)), (0, 1, 0, 1)),
            AttentionConfig(qk_norm=True, score_scale=0.2, soft_cap=5.0),
            MlpConfig("gelu_tanh"),
            embedding=EmbeddingConfig(scale=72**0.5),
            residual="sandwich",
            logit_soft_cap=10.0,
        ),
    ),
    "mixtral": replace(BASE, layers=DecoderLayers(NormConfig("rms", 1e-6), turns_by(RopeConfig()), experts=EXPERTS)),
    "some-experts": replace(
        BASE,
        layers=DecoderLayers(
            NormConfig("rms", 1e-6),
            turns_by(RopeConfig()),
            AttentionConfig(qk_norm=True),
            MlpConfig("relu"),
            experts=replace(EXPERTS, renormalise=False, layers=(False, True, False, True)),
        ),
    ),
}
TEXTS = [random_text(length, seed) for seed, length in enumerate((150, 33, 1))]


Values = dict[str, torch.Tensor]


def random_values(config: ModelConfig) -> Values:
    """Of all the model's parameters: logits differ from token to token, norms are not ones, biases not zeros."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, parameter in build_model(config).named_parameters():
        scale = 0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[1] ** 0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        values[name] = centre + scale * torch.randn(parameter.shape, generator=generator)
    return values


def loaded(config: ModelConfig, values: Values, dtype: torch.dtype, shard: Shard | None = None) -> LoadedModel:
    """The model, or what a rank holds of it."""
    model = build_model(config, shard)
    for path, module in model.named_modules():
        parts: dict[str, Part] = getattr(module, "parts", {})
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole, part = values[f"{path}.{name}"], parts.get(name, Part())
            of_rank = whole[_slice(part.rows_of(tuple(whole.shape)))]
            if part.columns is not None:
                of_rank = of_rank[:, _slice(part.columns)]
            assert of_rank.shape == parameter.shape
            module.register_parameter(name, torch.nn.Parameter(of_rank.to(dtype).contiguous(), requires_grad=False))
    return LoadedModel(model, config, "", shard or shard_of(config), dtype, num_bytes=0, model_bytes=0)


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def on_kernels(model: LoadedModel, kv_cache: KVCache, sums: SumsBetween | None = None) -> ModelExecutor:
    kernels = Kernels(PATH, kv_cache.dtype)
    packed = packed_for(model, kernels)
    return CpuExecutor(kernels, model, packed, kv_cache, max_tokens=256, max_position=256, num_threads=2, sums=sums)


def texts_on_kernels(model: LoadedModel, dtype: torch.dtype, *, int8: bool = False) -> Texts:
    layout = cpu_layout(model.config, 16, dtype, torch.int8 if int8 else None)
    assert layout is not None, "the kernels serve this decoder"
    return Texts(model, TEXTS, block_size=16, layout=layout, int8=int8, make_executor=on_kernels)


def compute(texts: Texts) -> list[torch.Tensor]:
    """Logits of each text, computed in steps that mix them."""
    texts.step({0: 101, 1: 20})
    texts.step({1: 1, 0: 48, 2: 1})
    texts.step({0: 1, 1: 12})
    return [texts.logits_of(text) for text in range(len(TEXTS))]


@pytest.mark.parametrize("name", DECODERS)
def test_the_kernels_compute_what_torch_does(name: str) -> None:
    config = DECODERS[name]
    values = random_values(config)
    expected = compute(Texts(loaded(config, values, torch.float32), TEXTS))
    actual = compute(texts_on_kernels(loaded(config, values, torch.float32), torch.float32))
    for of_text, of_expected in zip(actual, expected, strict=True):
        assert (of_text - of_expected).abs().max() < 1e-5 * of_expected.abs().max()


@pytest.mark.parametrize("name", DECODERS)
def test_with_kv_in_8_bits_they_are_as_near_as_torch(name: str) -> None:
    config, dtype = DECODERS[name], torch.float32
    values = random_values(config)
    exact = torch.cat(compute(Texts(loaded(config, values, dtype), TEXTS)))
    in_torch = torch.cat(compute(Texts(loaded(config, values, dtype), TEXTS, int8=True)))
    ours = torch.cat(compute(texts_on_kernels(loaded(config, values, dtype), dtype, int8=True)))
    assert 0 < (ours - exact).norm() < 1.1 * (in_torch - exact).norm()


@pytest.mark.parametrize("name", DECODERS)
def test_with_kv_in_8_bits_a_row_has_the_same_bits_however_steps_are_cut(name: str) -> None:
    config, dtype = DECODERS[name], torch.bfloat16
    values = random_values(config)
    together = compute(texts_on_kernels(loaded(config, values, dtype), dtype, int8=True))
    alone = texts_on_kernels(loaded(config, values, dtype), dtype, int8=True)
    for text, tokens in enumerate(TEXTS):
        alone.step({text: len(tokens)})
        assert torch.equal(alone.logits_of(text), together[text])


class Ranks:
    """A `ModelExecutor` of ranks in threads of one process, each with a cache of its own."""

    def __init__(self, config: ModelConfig, values: Values, like: KVCache, *, tp: int, pp: int) -> None:
        self._meeting = threading.Barrier(tp)
        self._partials: list[torch.Tensor] = [torch.empty(0)] * tp
        self._stages = [
            [
                self._rank(config, values, like, shard_of(config, tp=tp, pp=pp, rank=stage * tp + rank))
                for rank in range(tp)
            ]
            for stage in range(pp)
        ]

    def _rank(self, config: ModelConfig, values: Values, like: KVCache, shard: Shard) -> ModelExecutor:
        cache = KVCache(
            config,
            num_blocks=like.num_blocks,
            block_size=like.block_size,
            dtype=like.dtype,
            device=like.device,
            layout=like.layout,
            kv_heads=shard.kv_heads,
            layers=shard.layers,
        )
        cache.data.fill_(torch.nan)

        def total(partial: torch.Tensor) -> torch.Tensor:
            self._partials[shard.tp_rank] = partial.clone()
            self._meeting.wait()
            partial.copy_(torch.stack(self._partials).sum(0))
            self._meeting.wait()
            return partial

        return on_kernels(loaded(config, values, like.dtype, shard), cache, total if shard.tp_size > 1 else None)

    def forward(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        for stage in self._stages:
            with ThreadPoolExecutor(len(stage)) as pool:
                runs = [pool.submit(rank.forward, batch, hidden) for rank in stage]
                self._hidden = [run.result().clone() for run in runs]
            hidden = self._hidden[0]
        assert hidden is not None
        return hidden

    def logits(self, hidden: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
        assert all(torch.equal(of_rank, hidden) for of_rank in self._hidden)
        return torch.cat([rank.logits(hidden) for rank in self._stages[-1]], dim=1)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", DECODERS)
def test_ranks_together_compute_the_same(name: str, tp: int, pp: int) -> None:
    config = DECODERS[name]
    values = random_values(config)
    whole = loaded(config, values, torch.float32)
    expected = torch.cat(compute(texts_on_kernels(loaded(config, values, torch.float32), torch.float32)))
    ranks = Texts(
        whole,
        TEXTS,
        block_size=16,
        layout=KVLayout(1),
        make_executor=lambda _, kv_cache: Ranks(config, values, kv_cache, tp=tp, pp=pp),
    )
    actual = torch.cat(compute(ranks))
    if tp == 1:
        assert torch.equal(actual, expected)
    else:
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
