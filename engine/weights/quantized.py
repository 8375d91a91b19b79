"""Weights in few bits: integers, of which each group of a row's columns has its scale.

int8    value = scale * integer, -127 to 127; 8.5 bits a weight with the scales
int4    value = scale * integer + minimum, 0 to 15; 5 bits a weight with scales and minima

An embedding and an output matrix are int8 either way. Groups, scales and minima are those of GGUF's Q8_0 and Q4_1: what
was quantised so, or as Q4_0, keeps its values.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional as F

from pdmesh.errors import ConfigError

GROUP = 32

# How often the range of 4 bits is fitted. SmolLM2 with its columns in another order, so that groups are not its file's,
# has 28 % more perplexity with none, 21 % with three, and hardly less with six.
_FITS = 3

# Quantised at a time: float32 values that stay in the processor's cache.
_PIECE_VALUES = 1 << 16


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a weight is quantised: to integers of so many bits, with a minimum for each group or symmetric around 0."""

    name: str
    bits: int
    has_minima: bool

    def num_bytes(self, n: int, k: int) -> int:
        """Of a quantised matrix [n, k]."""
        num_groups = n * -(-k // GROUP)
        return num_groups * (GROUP * self.bits // 8 + (4 if self.has_minima else 2))


INT8 = WeightFormat("int8", 8, has_minima=False)
INT4 = WeightFormat("int4", 4, has_minima=True)
# Of a vocabulary's matrices, whatever the others': in 4 bits, SmolLM2's alone cost 6.5 % of its perplexity.
VOCABULARY_FORMAT = INT8
FORMATS = {weight_format.name: weight_format for weight_format in (INT8, INT4)}


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A matrix [n, k] in few bits. Columns are padded to whole groups.

    Attributes:
        values: uint8 [n, bytes of a row]. int8: two's complement. int4: two columns a byte, the first in its low half.
        scales: float16 [n, groups].
        minima: float16 [n, groups]; None where the format has none.
        num_columns: k.
        dtype: What it is dequantised to.
    """

    format: WeightFormat
    values: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None
    num_columns: int
    dtype: torch.dtype

    @staticmethod
    def empty(weight_format: WeightFormat, n: int, k: int, dtype: torch.dtype) -> "QuantizedWeight":
        """Memory for a matrix, to be filled by `store_rows`."""
        num_groups = -(-k // GROUP)
        scales = torch.empty(n, num_groups, dtype=torch.float16)
        return QuantizedWeight(
            weight_format,
            torch.empty(n, num_groups * GROUP * weight_format.bits // 8, dtype=torch.uint8),
            scales,
            torch.empty_like(scales) if weight_format.has_minima else None,
            k,
            dtype,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), self.num_columns

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scales, self.minima) if part is not None)

    def __len__(self) -> int:
        return len(self.values)

    def store_rows(self, first: int, rows: torch.Tensor, quantizer: "Quantizer | None" = None) -> None:
        """Quantises `rows` [m, k], of any float dtype, to be those from `first` on. Takes memory for a piece of them.

        Args:
            quantizer: None: in plain torch, `quantize_rows`.

        Raises ConfigError where they hold NaN, or values too large for float16 scales.
        """
        rows_each = max(1, _PIECE_VALUES // self.num_columns)
        for begin in range(0, len(rows), rows_each):
            piece = rows[begin : begin + rows_each].float().contiguous()
            place = self._rows(slice(first + begin, first + begin + len(piece)))
            (quantizer or quantize_rows)(piece, place)
            if not torch.isfinite(place.scales).all() or not (
                place.minima is None or torch.isfinite(place.minima).all()
            ):
                raise ConfigError(f"holds NaN, or values too large for {self.format.name}")

    def dequantized(self) -> torch.Tensor:
        """[n, k], computed in float32 and rounded to `dtype` once."""
        if self.minima is None:
            integers = self.values.view(torch.int8).float()
        else:
            integers = torch.stack((self.values & 15, self.values >> 4), dim=2).flatten(1).float()
        groups = integers.view(*self.scales.shape, GROUP) * self.scales.float()[..., None]
        if self.minima is not None:
            groups += self.minima.float()[..., None]
        return groups.flatten(1)[:, : self.num_columns].to(self.dtype)

    def __getitem__(self, index: torch.Tensor) -> "QuantizedWeight":
        """Those rows."""
        return self._rows(index)

    def to(self, device: torch.device) -> "QuantizedWeight":
        minima = None if self.minima is None else self.minima.to(device)
        return replace(self, values=self.values.to(device), scales=self.scales.to(device), minima=minima)

    def _rows(self, index: torch.Tensor | slice) -> "QuantizedWeight":
        minima = None if self.minima is None else self.minima[index]
        return replace(self, values=self.values[index], scales=self.scales[index], minima=minima)


Weight = torch.Tensor | QuantizedWeight


class Quantizer(Protocol):
    """Quantises float32 rows [m, k] to all of `to`, which is contiguous. What cannot be, gets scales of inf or NaN."""

    def __call__(self, rows: torch.Tensor, to: QuantizedWeight) -> None: ...


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's matrices are quantised as they are loaded.

    Attributes:
        format: Of all but a vocabulary's; None: not at all.
        quantizer: None: in plain torch.
    """

    format: WeightFormat | None = None
    quantizer: Quantizer | None = None


UNQUANTIZED = Quantization()


def quantize(weight: torch.Tensor, weight_format: WeightFormat, quantizer: Quantizer | None = None) -> QuantizedWeight:
    """Of a matrix of any float dtype, to be dequantised to the same one. Raises ConfigError; see `store_rows`."""
    n, k = weight.shape
    quantized = QuantizedWeight.empty(weight_format, n, k, weight.dtype)
    quantized.store_rows(0, weight, quantizer)
    return quantized


def quantize_rows(rows: torch.Tensor, to: QuantizedWeight) -> None:
    """The `Quantizer` in plain torch, of which the kernels' gives the very bits."""
    padding = -to.num_columns % GROUP
    # The last value again: a group's range is that of its own values.
    groups = F.pad(rows[None], (0, padding), mode="replicate").view(*to.scales.shape, GROUP)
    scales, minima = _ranges_int8(groups) if to.minima is None else _ranges_int4(groups)
    to.scales.copy_(scales)
    integers = _integers(groups, scales, minima, to.format).to(torch.int8)
    if padding:
        integers[:, -1, GROUP - padding :] = 0
    if minima is None:
        to.values.copy_(integers.flatten(1).view(torch.uint8))
        return
    assert to.minima is not None
    to.minima.copy_(minima)
    even, odd = integers.view(torch.uint8).view(len(rows), -1, 2).unbind(2)
    to.values.copy_(even | odd << 4)


def linear(hidden: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, also of a quantised weight, which is dequantised for it."""
    return F.linear(hidden, weight.dequantized() if isinstance(weight, QuantizedWeight) else weight, bias)


def embedding(token_ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`F.embedding` of [T] tokens, also of a quantised weight, of which only these rows are dequantised."""
    if isinstance(weight, QuantizedWeight):
        return weight[token_ids].dequantized()
    return F.embedding(token_ids, weight)


# Float16 scales and minima [m, groups].
_Ranges = tuple[torch.Tensor, torch.Tensor]


def _ranges_int8(groups: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Float16 scales [m, groups] of groups [m, groups, GROUP]."""
    return (groups.abs().amax(-1) / 127).half(), None


def _ranges_int4(groups: torch.Tensor) -> _Ranges:
    """From the least value to the largest, or symmetric around 0; then, while that helps, the line through the nearest
    integers: the smallest squared error of these."""
    low, high = groups.aminmax(dim=-1)
    # As Q4_0: the value of the largest size is -8 scales.
    symmetric = (torch.where(high.abs() > low.abs(), high, low) / -8).half()
    ranges = _better(groups, (((high - low) / 15).half(), low.half()), (symmetric, symmetric * -8))
    for _ in range(_FITS):
        ranges = _better(groups, ranges, _fitted(groups, ranges))
    return ranges


def _better(groups: torch.Tensor, ranges: _Ranges, others: _Ranges) -> _Ranges:
    """Of each group, the range of less error, the first if equal."""
    better = _errors(groups, others) < _errors(groups, ranges)
    scales, minima = (torch.where(better, other, one) for one, other in zip(ranges, others, strict=True))
    return scales, minima


def _errors(groups: torch.Tensor, ranges: _Ranges) -> torch.Tensor:
    """The sums of squares [m, groups]."""
    scales, minima = (of_groups.float()[..., None] for of_groups in ranges)
    return _sum((groups - (_integers(groups, *ranges, INT4) * scales + minima)).square())


def _fitted(groups: torch.Tensor, ranges: _Ranges) -> _Ranges:
    """The ranges by which these integers come nearest to the values, by least squares; NaN where all are the same."""
    integers = _integers(groups, *ranges, INT4)
    of_integers, of_values = _sum(integers), _sum(groups)
    products, squares = GROUP * _sum(integers * groups), GROUP * _sum(integers.square())
    scales = ((products - of_integers * of_values) / (squares - of_integers.square())).half()
    return scales, ((of_values - scales.float() * of_integers) / GROUP).half()


def _sum(groups: torch.Tensor) -> torch.Tensor:
    """Of each group, halves added to halves: so do the kernels, to the same bits."""
    while groups.shape[-1] > 1:
        first, second = groups.chunk(2, dim=-1)
        groups = first + second
    return groups[..., 0]


def _integers(
    groups: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None, weight_format: WeightFormat
) -> torch.Tensor:
    """Float32 [m, groups, GROUP]: the nearest integers of the format."""
    wide = scales.float()[..., None]
    # A group of nothing but one value has no range.
    wide = torch.where(wide == 0, torch.ones_like(wide), wide)
    if minima is None:
        return (groups / wide).round_().clamp_(-127, 127)
    return ((groups - minima.float()[..., None]) / wide).round_().clamp_(0, 2**weight_format.bits - 1)
