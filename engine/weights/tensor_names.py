"""How a family's checkpoints name and lay out what a model names the same in all families.

A model's names are those of Llama in Hugging Face checkpoints, e.g. "model.layers.0.self_attn.q_proj.weight"
(engine/models/decoder.py has them all). A family's `TensorNames` says where its checkpoints differ.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

LAYERS = "model.layers"


@dataclass(frozen=True, slots=True)
class Fused:
    """A stored map that holds several of a layer's.

    Attributes:
        stored: Its name within a layer.
        modules: Those that it holds, in this order, by the model's names within a layer.
        per_head: Head after head, and of each head the rows of all `modules`; else all rows of one after all of
            another.
    """

    stored: str
    modules: tuple[str, ...]
    per_head: bool = False


@dataclass(frozen=True, slots=True)
class TensorNames:
    """A family's.

    Modules that no mapping names are stored under the model's names. A `{}` stands for a number, e.g. of an expert.

    Attributes:
        top: Outside of the layers: the model's name of a module to the stored one.
        layers: What layers are called, up to the point before their number.
        layer: Within a layer: the model's name of a module to the stored one.
        fused: Stored maps that hold several modules.
        transposed: Matrices of the layers are stored [inputs, outputs].
        optional_prefix: Of stored names; some checkpoints leave it out of all of them.
        redundant: What other tensors, computed here or of no use, end with.
        not_read: What those of another model in the same checkpoint begin with.
    """

    top: Mapping[str, str] = field(default_factory=dict)
    layers: str = LAYERS
    layer: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    transposed: bool = False
    optional_prefix: str = ""
    redundant: tuple[str, ...] = (".rotary_emb.inv_freq",)
    not_read: tuple[str, ...] = ()

    def stored(self, module: str) -> str:
        """The stored name of a module that is not fused with others."""
        number, within = layer_and_module(module)
        if number is None:
            return self.top.get(module, module)
        return f"{self.layers}.{number}.{_renamed(within, self.layer)}"


# Of families whose checkpoints name tensors as models do.
SAME_NAMES = TensorNames()


def layer_and_module(module: str) -> tuple[str | None, str]:
    """A layer's number and a module's name within it; None and the whole name outside of the layers."""
    if not module.startswith(f"{LAYERS}."):
        return None, module
    number, _, within = module.removeprefix(f"{LAYERS}.").partition(".")
    return number, within


def _renamed(module: str, names: Mapping[str, str]) -> str:
    numbers = re.findall(r"\d+", module)
    pattern = re.sub(r"\d+", "{}", module)
    return names[pattern].format(*numbers) if pattern in names else module
