"""Ranks that load a model: what they hold together is the model, and what each reads is its part."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.engine.checkpoints import write_gguf
from engine.loader import LoadedModel, Split, load_model
from engine.weights.source import open_checkpoint
from tests.texts import load

CPU = torch.device("cpu")
BY_ROWS = ("q_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
KV = ("k_proj", "v_proj")
BY_COLUMNS = ("o_proj", "down_proj")


def in_shards(model: Path, directory: Path) -> Path:
    LlamaForCausalLM.from_pretrained(model).save_pretrained(directory, max_shard_size="50KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def in_gguf(model: Path, directory: Path) -> Path:
    directory.mkdir()
    write_gguf(open_checkpoint(str(model)), "float32", directory / "model.gguf")
    return directory / "model.gguf"


def load_rank(source: Path, tp: int, pp: int, rank: int) -> tuple[LoadedModel, int]:
    """A rank's part, and how many bytes it read."""
    progress: list[tuple[int, int]] = []
    loaded = load_model(
        str(source), "float32", CPU, lambda done, total: progress.append((done, total)), Split(tp, pp, rank)
    )
    assert progress[0][0] == 0
    assert progress[-1][0] == progress[-1][1]
    return loaded, progress[-1][1]


@pytest.mark.parametrize("write", [in_shards, in_gguf])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("shape", ["gqa", "mqa-tied", "biases", "wide-heads"])
def test_the_ranks_together_have_the_model(
    tiny_llama: Callable[[str], Path],
    tmp_path: Path,
    shape: str,
    tp: int,
    pp: int,
    write: Callable[[Path, Path], Path],
) -> None:
    source = write(tiny_llama(shape), tmp_path / "model")
    whole = load(source)
    ranks = [load_rank(source, tp, pp, rank) for rank in range(tp * pp)]
    assert {loaded.digest for loaded, _ in ranks} == {whole.digest}

    parameters = [dict(loaded.model.named_parameters()) for loaded, _ in ranks]
    expected = dict(whole.model.named_parameters())
    assert set().union(*parameters) == expected.keys()
    for name, values in expected.items():
        # An embedding that is the output matrix too is held by two stages.
        for stage in range(pp):
            of_stage = range(stage * tp, (stage + 1) * tp)
            holders = [rank for rank in of_stage if name in parameters[rank]]
            assert _is_held(name, stage, pp, whole, ranks[stage * tp][0]) == bool(holders), name
            if not holders:
                continue
            parts: list[torch.Tensor] = [parameters[rank][name] for rank in holders]
            assert all(part.is_contiguous() for part in parts)
            if name.endswith("bias") and any(kind in name for kind in BY_COLUMNS):
                # Of a sum's bias one rank takes care.
                assert holders == [stage * tp], name
                assert torch.equal(parts[0], values), name
                continue
            assert holders == list(of_stage), name
            if any(kind in name for kind in BY_COLUMNS):
                assert torch.equal(torch.cat(parts, dim=1), values), name
            elif any(kind in name for kind in BY_ROWS):
                assert torch.equal(torch.cat(parts), values), name
            elif any(kind in name for kind in KV):
                per_head = dict(zip((ranks[rank][0].shard.kv_heads for rank in holders), parts, strict=True))
                assert torch.equal(torch.cat(list(per_head.values())), values), name
            else:
                assert "norm" in name
                assert all(torch.equal(part, values) for part in parts), name


def _is_held(name: str, stage: int, pp: int, whole: LoadedModel, of_stage: LoadedModel) -> bool:
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) in of_stage.shard.layers
    if "embed_tokens" in name:
        return stage == 0 or (stage == pp - 1 and whole.config.tie_word_embeddings)
    return stage == pp - 1


@pytest.mark.parametrize("write", [in_shards, in_gguf])
def test_a_rank_reads_and_holds_no_more_than_its_part(
    tiny_llama: Callable[[str], Path], tmp_path: Path, write: Callable[[Path, Path], Path]
) -> None:
    source = write(tiny_llama("gqa"), tmp_path / "model")
    whole = load(source)
    for tp, pp in ((2, 1), (2, 3)):
        ranks = [load_rank(source, tp, pp, rank) for rank in range(tp * pp)]
        for loaded, num_read in ranks:
            # In the file, too, values are float32.
            assert num_read == loaded.num_bytes
        norms = sum(values.nbytes for name, values in whole.model.named_parameters() if "norm" in name)
        assert sum(num_read for _, num_read in ranks) == whole.num_bytes + (tp - 1) * norms
    for rank in (0, 1):
        loaded, _ = load_rank(source, 2, 1, rank)
        # Its storage is its part's, not the file's tensor of which it would be a view.
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in loaded.model.parameters())
        assert loaded.num_bytes < 0.55 * whole.num_bytes
