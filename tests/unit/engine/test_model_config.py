"""What config.json says is read right, or refused in one line that names file and field."""

import pytest
from transformers import LlamaConfig

from engine.config_fields import Fields
from engine.decoder_config import DecoderLayers, NormConfig, turns_by
from engine.model_config import ModelConfig
from engine.models import config_from_hf
from engine.rope import RopeConfig
from pdmesh.errors import ConfigError

# As meta-llama/Llama-2-7b-hf says it.
LLAMA2: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def read(config: dict[str, object], generation: dict[str, object] | None = None) -> ModelConfig:
    return config_from_hf(
        Fields("/m/config.json", config), Fields("/m/generation_config.json", generation or {}), "llama-2"
    )


def test_a_real_config() -> None:
    assert read(LLAMA2) == ModelConfig(
        name="llama-2",
        architecture="LlamaForCausalLM",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position=4096,
        tie_word_embeddings=False,
        eos_token_ids=(2,),
        bos_token_id=1,
        layers=DecoderLayers(NormConfig("rms", 1e-5), turns_by(RopeConfig(10000.0))),
    )


def test_defaults_are_those_of_transformers() -> None:
    needed = (
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    )
    config = read({name: LLAMA2[name] for name in needed})
    reference = LlamaConfig(hidden_size=4096, num_attention_heads=32)
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == reference.head_dim
    assert config.max_position == reference.max_position_embeddings
    assert DecoderLayers.of(config).norm.eps == reference.rms_norm_eps
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert DecoderLayers.of(config).rope.theta == reference.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (None, None, ()),
        (2, [128, 129], (128, 129)),
        (2, 7, (7,)),
        ([2], None, (2,)),
    ],
)
def test_generation_config_says_what_ends_a_text(config: object, generation: object, expected: tuple[int, ...]) -> None:
    assert read(LLAMA2 | {"eos_token_id": config}, {"eos_token_id": generation}).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"]},
            "architectures is ['T5ForConditionalGeneration']: must name one of the known: BloomForCausalLM",
        ),
        ({"architectures": None}, "architectures is None: must name one of the known"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -4096}, "hidden_size is -4096: must be an integer in [1, "),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776: must be an integer in [1, "),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5: must be an integer in [1, "),
        ({"vocab_size": True}, "vocab_size is True: must be an integer in [1, "),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32': must be an integer in [1, "),
        ({"intermediate_size": 0}, "intermediate_size is 0: must be an integer in [1, "),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5: must divide num_attention_heads, 32"),
        ({"num_attention_heads": 30, "num_key_value_heads": 30}, "head_dim is None: must be given"),
        ({"head_dim": 63}, "head_dim is 63: must be even"),
        ({"max_position_embeddings": 2**60}, "max_position_embeddings is 1152921504606846976: must be an integer"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf: must be a number in [1e-12, 0.1]"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no': must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only silu is supported"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config is {'quant_method': 'gptq'}: quantised",
        ),
        ({"eos_token_id": 32000}, "eos_token_id is 32000: must be token ids below 32000"),
        ({"bos_token_id": -1}, "bos_token_id is -1: must be an integer in [0, 31999]"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': must be an object"),
    ],
)
def test_refusals_name_file_and_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(LLAMA2 | changes)
    assert caught.value.message.startswith(f"/m/config.json: {message}")
    assert "\n" not in caught.value.message


def test_a_wrong_end_of_text_is_blamed_on_its_file() -> None:
    with pytest.raises(ConfigError, match=r"^/m/generation_config.json: eos_token_id is \[99999\]: "):
        read(LLAMA2, {"eos_token_id": [99999]})
