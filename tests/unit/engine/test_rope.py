"""Frequencies equal those of transformers bit for bit; schemes that are not built are refused by name."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config_fields import Fields
from engine.rope import (
    LinearScaling,
    RopeConfig,
    YarnScaling,
    angles,
    inverse_frequencies,
    rope_from_gguf,
    rope_from_hf,
    rotate,
    yarn_attention_factor,
)
from pdmesh.errors import ConfigError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500000},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        LLAMA3 | {"rope_theta": 500000.0},
        LLAMA3 | {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64},
        YARN | {"rope_theta": 10000.0},
        YARN | {"rope_theta": 1000000.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        YARN | {"rope_theta": 10000.0, "attention_factor": 0.7},
        YARN | {"rope_theta": 10000.0, "mscale": 0.707, "mscale_all_dim": 1.3},
        YARN | {"rope_theta": 10000.0, "mscale": 0.707},
        YARN | {"rope_theta": 10000.0, "original_max_position_embeddings": 4096, "factor": 1.0},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_equal_to_transformers(parameters: dict[str, object], head_dim: int) -> None:
    reference = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=dict(parameters)
    )
    compute = LlamaRotaryEmbedding.compute_default_rope_parameters
    if parameters["rope_type"] != "default":
        compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    expected, expected_scaling = compute(reference)
    rope = rope_from_hf(Fields("config.json", {"rope_parameters": parameters}), 4096)
    assert torch.equal(inverse_frequencies(rope, head_dim), expected)
    assert rope.attention_scaling == expected_scaling


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 50000.0}, {"rope_type": "default", "rope_theta": 50000.0}),
        ({}, {"rope_type": "default"}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_theta": 7e5, "rope_scaling": LLAMA3}, LLAMA3 | {"rope_theta": 7e5}),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 512},
            YARN | {"original_max_position_embeddings": 512},
        ),
    ],
)
def test_old_and_new_spelling_mean_the_same(old: dict[str, object], new: dict[str, object]) -> None:
    expected = rope_from_hf(Fields("config.json", {"rope_parameters": new}), 4096)
    assert rope_from_hf(Fields("config.json", old), 4096) == expected


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "longrope"}, "rope_type is 'longrope': supported are default, linear, dynamic, llama3 and yarn"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0: must be a number"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2': must be a number"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor is nan: must be a number"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor is 1.0: must be above low_freq_factor, 1"),
        (YARN | {"original_max_position_embeddings": -1}, "original_max_position_embeddings is -1: must be an integer"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0: must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: rotating a part"),
    ],
)
def test_refusals_name_file_and_field(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rope_from_hf(Fields("/m/config.json", {"rope_parameters": parameters}), 4096)
    assert caught.value.message.startswith(f"/m/config.json: rope_parameters.{message}")
    assert "\n" not in caught.value.message


def test_gguf_metadata() -> None:
    def rope(values: dict[str, object], factors: tuple[float, ...] = ()) -> RopeConfig:
        return rope_from_gguf(
            Fields("m.gguf", {f"rope.{name}": value for name, value in values.items()}, "llama."), 4096, factors
        )

    assert rope({}) == RopeConfig(10000.0)
    assert rope({"freq_base": 5e5}) == RopeConfig(5e5)
    assert rope({"scaling.type": "linear", "scaling.factor": 2.0}).scaling == LinearScaling(2.0)
    assert rope({"scale_linear": 4.0}).scaling == LinearScaling(4.0)
    assert rope({"scaling.type": "none", "scaling.factor": 2.0}).scaling is None
    assert rope({"scaling.factor": 0.0}).scaling is None
    yarn = rope({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 1024})
    assert yarn.scaling == YarnScaling(4.0, 1024, yarn_attention_factor(4.0))
    with pytest.raises(ConfigError, match=r"^m.gguf: llama.rope.scaling.type is 'longrope': supported are"):
        rope({"scaling.type": "longrope"})
    factored = rope({}, (1.0, 2.0, 4.0, 8.0))
    assert torch.equal(inverse_frequencies(factored, 8), inverse_frequencies(rope({}), 8) / torch.tensor([1, 2, 4, 8]))


def test_rotate_turns_each_pair_by_its_angle() -> None:
    inv_freq = inverse_frequencies(RopeConfig(100.0), 4)
    x = torch.randn(3, 2, 4)
    turned = rotate(x, *angles(torch.tensor([0, 5, 1000]), inv_freq, 1.0))
    assert torch.equal(turned[0], x[0])
    for token, position in [(1, 5), (2, 1000)]:
        pairs = torch.complex(x[token, :, :2], x[token, :, 2:])
        expected = pairs * torch.exp(1j * position * inv_freq)
        torch.testing.assert_close(turned[token, :, :2], expected.real)
        torch.testing.assert_close(turned[token, :, 2:], expected.imag)
