"""The same weights in the same precision for every engine: a Hugging Face directory, and a GGUF file for llama.cpp.

Both are made once from what the user names, and kept. Neither has a tokenizer: the bench speaks in token ids.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

from engine.decoder_config import DecoderLayers
from engine.loader import DTYPES
from engine.model_config import ModelConfig
from engine.models import llama
from engine.weights.checkpoint import Checkpoint
from engine.weights.digest import model_digest
from engine.weights.source import open_checkpoint
from pdmesh.errors import ConfigError

_GGUF_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """One model as the engines take it."""

    config: ModelConfig
    directory: Path
    gguf_file: Path


def bench_cache() -> Path:
    """Where the bench keeps what is worth keeping between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdmesh" / "bench"


def prepare(source: str, dtype: str, *, with_gguf: bool) -> Checkpoints:
    """Opens what `source` names and writes what is not there yet. Raises ConfigError.

    Args:
        dtype: A key of `engine.loader.DTYPES`.
        with_gguf: Also the GGUF file, which knows no scaled rotary embedding here.
    """
    checkpoint = open_checkpoint(source)
    cached = bench_cache() / f"{Path(source).stem}-{model_digest(checkpoint)[:12]}-{dtype}"
    cached.mkdir(parents=True, exist_ok=True)
    directory = Path(source)
    if not directory.is_dir():
        directory = cached
        if not (directory / "config.json").exists():
            write_directory(checkpoint, dtype, directory)
    gguf_file = cached / "model.gguf"
    if with_gguf and not gguf_file.exists():
        write_gguf(checkpoint, dtype, gguf_file)
    return Checkpoints(checkpoint.config, directory, gguf_file)


def write_directory(checkpoint: Checkpoint, dtype: str, directory: Path) -> None:
    """A Hugging Face directory without a tokenizer. config.json comes last: a directory that has one is whole."""
    config = checkpoint.config
    _check_plain_llama(config)
    tensors = {name: checkpoint.read(name, DTYPES[dtype]).contiguous() for name in checkpoint.tensors}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf_config(config, dtype), indent=2) + "\n")


def hf_config(config: ModelConfig, dtype: str) -> dict[str, object]:
    """The fields of config.json, of a Llama."""
    layers = DecoderLayers.of(config)
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": layers.norm.eps,
        "max_position_embeddings": config.max_position,
        "rope_theta": layers.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": layers.attention.qkv_bias,
        "mlp_bias": layers.mlp.bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }


def write_gguf(checkpoint: Checkpoint, dtype: str, path: Path) -> None:
    """A GGUF file without a vocabulary; whole as soon as it has its name."""
    config = checkpoint.config
    _check_plain_llama(config)
    layers = DecoderLayers.of(config)
    unfinished = path.with_suffix(".unfinished")
    tensor_type, file_type = _GGUF_TYPES[dtype]
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(layers.rope.theta)
    writer.add_layer_norm_rms_eps(layers.norm.eps)
    for name in checkpoint.tensors:
        values = _in_gguf_order(name, checkpoint.read(name, torch.float32), config)
        # Vectors (norms, biases) stay float32: llama.cpp's kernels ask for it.
        stored = tensor_type if values.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor that Hugging Face calls `name`."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        number, _, module = module.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{_GGUF_NAMES[module]}.{kind}"
    return f"{_GGUF_NAMES[module]}.{kind}"


def _in_gguf_order(name: str, values: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rows of q and k with the halves of each head interleaved: llama.cpp turns neighbouring dimensions together."""
    num_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if num_heads is None:
        return values
    halves = values.view(num_heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape).contiguous()


def _check_plain_llama(config: ModelConfig) -> None:
    if config.architecture != llama.FAMILY.architecture:
        raise ConfigError(
            f"{config.name} is a {config.architecture}, and the bench converts only Llamas: "
            "give a Hugging Face directory and leave llamacpp out"
        )
    rope = DecoderLayers.of(config).rope
    if rope.scaling is not None or rope.freq_factors:
        raise ConfigError(
            f"{config.name} scales its rotary embedding, and the bench converts only models that do not: "
            "give a Hugging Face directory and leave llamacpp out"
        )
