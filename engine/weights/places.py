"""Where in a checkpoint a model's tensors lie: which stored tensor, and which part of it."""

from collections.abc import Collection, Mapping

from engine.weights.checkpoint import Part
from engine.weights.tensor_names import Fused, TensorNames, layer_and_module


class TensorPlaces:
    """Of one model in one checkpoint.

    Args:
        names: How the checkpoint names tensors.
        shapes: Of the whole model's tensors, by the model's names.
        head_dim: Of its heads.
        stored: The names of the checkpoint's tensors.
    """

    def __init__(
        self, names: TensorNames, shapes: Mapping[str, tuple[int, ...]], head_dim: int, stored: Collection[str]
    ) -> None:
        self._names = names
        self._shapes = shapes
        self._head_dim = head_dim
        self._fused = {module: fused for fused in names.fused for module in fused.modules}
        prefix = names.optional_prefix
        self._left_out = prefix if not any(name.startswith(prefix) for name in stored) else ""

    def place(self, name: str, part: Part) -> tuple[str, Part]:
        """A stored tensor and what of it is `part`, in rows and columns of the model's tensor `name`."""
        module, _, leaf = name.rpartition(".")
        number, within = layer_and_module(module)
        transposed = self._names.transposed and number is not None and len(self._shapes[name]) == 2
        fused = self._fused.get(within)
        if fused is None:
            stored = self._names.stored(module)
            rows = part.rows
        else:
            stored = f"{self._names.layers}.{number}.{fused.stored}"
            rows = self._rows_in_fused(fused, name, part)
        return f"{stored.removeprefix(self._left_out)}.{leaf}", Part(rows, part.columns, transposed=transposed)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The stored tensors that the whole model asks for, and their shapes."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (num_rows, *columns) in self._shapes.items():
            stored, part = self.place(name, Part())
            if stored in shapes:
                num_rows += shapes[stored][-1 if part.transposed else 0]
            shapes[stored] = (*columns, num_rows) if part.transposed else (num_rows, *columns)
        return shapes

    def is_redundant(self, stored: str) -> bool:
        """Whether a stored tensor that the model does not ask for is known to be of no use."""
        tied = "lm_head.weight" not in self._shapes and stored == self.place_of_output()
        return tied or stored.endswith(self._names.redundant) or stored.startswith(self._names.not_read)

    def place_of_output(self) -> str:
        """The name under which an output matrix would be stored."""
        return f"{self._names.stored('lm_head').removeprefix(self._left_out)}.weight"

    def _rows_in_fused(self, fused: Fused, name: str, part: Part) -> tuple[range, ...]:
        module, _, leaf = name.rpartition(".")
        _, within = layer_and_module(module)
        outside = module.removesuffix(within)
        place = fused.modules.index(within)
        (rows,) = part.runs_of(self._shapes[name])
        if fused.per_head:
            size, of_head = self._head_dim, len(fused.modules) * self._head_dim
            assert rows.start % size == rows.stop % size == 0, f"{rows} of {name} cut through a head"
            firsts = (head * of_head + place * size for head in range(rows.start // size, rows.stop // size))
            return tuple(range(first, first + size) for first in firsts)
        first = sum(self._shapes[f"{outside}{other}.{leaf}"][0] for other in fused.modules[:place])
        return (range(first + rows.start, first + rows.stop),)
