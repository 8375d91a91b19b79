"""That a reordered Llama is the same function, in other groups."""

from pathlib import Path

import torch

from bench.precision.reordered import write_reordered
from engine.weights.source import open_checkpoint
from tests.texts import random_text, reference_logits
from tests.tiny_llamas import make_tiny_llama


def test_a_reordered_llama_foresees_the_same(tmp_path: Path) -> None:
    directory, text = make_tiny_llama(tmp_path / "gqa", "gqa"), random_text(40)
    before = open_checkpoint(str(directory))
    write_reordered(directory, before.config, tmp_path / "reordered")
    after = open_checkpoint(str(tmp_path / "reordered"))
    expected = reference_logits(directory, text)
    assert (reference_logits(tmp_path / "reordered", text) - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, tensor in before.tensors.items():
        if len(tensor.shape) == 2:
            one, other = (each.read(name, torch.float32)[:, :32] for each in (before, after))
            assert not torch.equal(one.sort().values, other.sort().values), name
