"""The KV cache's tensor: where the keys and values of every block lie, how they get there, and how they leave.

A block is one contiguous run of bytes over all heads and layers, and travels as it lies: [KV head][layer][K, V][tile].
A range of heads is one run in it, too. Where several ranks of a host compute one model, the `KVCache` of each is its
region, its heads and layers of every block, in memory where blocks lie whole: what moves blocks knows of no ranks.

Of the tile, the tokens of one block in one layer and head, there are two orders:

    plain   K and V [token][dim]
    dot     K [dim / pack][token][pack], V [token / pack][dim][pack]

The second is what a CPU's dot products read: pack is how many values one multiply-add takes (2 of bfloat16, else 1).

Where the cache stores int8 (engine/kv_int8.py), a tile's float32 scales lie behind its values: [K, V][token].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.kv_int8 import dequantize, quantize
from engine.model_config import ModelConfig
from pdmesh.errors import ConfigError
from pdmesh.kv_memory import map_shared, private_memory, shared_memory
from pdmesh.types import MemoryFile


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The order of values in a tile. Workers whose layouts have one name exchange blocks as they lie.

    Attributes:
        pack: Values of a multiply-add in the dot order; None: the plain order.
    """

    pack: int | None = None

    @property
    def name(self) -> str:
        return "block.head.layer.kv.token.dim" if self.pack is None else f"block.head.layer.kv.dot{self.pack}"


PLAIN = KVLayout()

_SCALE_BYTES = 4


def bytes_per_block(config: ModelConfig, block_size: int, kv_dtype: torch.dtype) -> int:
    """Bytes of one whole block: K and V of `block_size` tokens over all heads and layers, and the scales of int8."""
    return config.num_layers * config.num_kv_heads * _Tile(block_size, config.head_dim, kv_dtype).num_bytes


@dataclass(frozen=True, slots=True)
class _Tile:
    """K and V of one block in one layer and head."""

    block_size: int
    head_dim: int
    kv_dtype: torch.dtype

    @property
    def value_bytes(self) -> int:
        return 2 * self.block_size * self.head_dim * self.kv_dtype.itemsize

    @property
    def scales_begin(self) -> int:
        """Behind the values, where a float32 may lie."""
        return -(-self.value_bytes // _SCALE_BYTES) * _SCALE_BYTES

    @property
    def num_bytes(self) -> int:
        if self.kv_dtype != torch.int8:
            return self.value_bytes
        return self.scales_begin + 2 * self.block_size * _SCALE_BYTES

    def values(self, tiles: torch.Tensor) -> torch.Tensor:
        """[..., 2, block_size, head_dim], a view of bytes [..., num_bytes]."""
        values = tiles[..., : self.value_bytes].view(self.kv_dtype)
        return values.view(*tiles.shape[:-1], 2, self.block_size, self.head_dim)

    def scales(self, tiles: torch.Tensor) -> torch.Tensor | None:
        """[..., 2, block_size], likewise; None where values have none."""
        if self.kv_dtype != torch.int8:
            return None
        return tiles[..., self.scales_begin :].view(torch.float32).view(*tiles.shape[:-1], 2, self.block_size)


class KVCache:
    """A region of `num_blocks` blocks, some KV heads and layers of them or all, and the `BlockMemory` through which
    blocks travel, which are whole.

    Memory is taken from the system as it is first written. What was never written is garbage and may be NaN: whoever
    reads blocks must discard the tokens past a sequence's end, not weigh them by zero.

    Attributes:
        data: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim] of the region; index 0 of the fourth is K.
            On a CPU a strided view of the whole blocks, on a device of the region alone; a tile's K and V lie side by
            side.
            The last two dimensions are a tile's: what they say of tokens and dims holds in the plain layout only.
        scales: [num_blocks, num_kv_heads, num_layers, 2, block_size] of int8, in either layout; else None.
        dtype: What attention computes in.
        num_layers, num_kv_heads: Of the region.
        file: Where the whole blocks lie, as long as others may be lent them; else None.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        layout: KVLayout = PLAIN,
        kv_heads: range | None = None,
        layers: range | None = None,
        lend: bool = False,
        memory: MemoryFile | None = None,
    ) -> None:
        """A cache in new memory, or in that of other ranks.

        Args:
            config: Of the whole model.
            kv_dtype: What is stored: torch.int8, or None for `dtype`.
            kv_heads: Those of the region; None: all.
            layers: Those of the region; None: all.
            lend: The whole blocks lie in `file`, for other processes of this host to read.
            memory: Maps this file, which is as long as the whole blocks and not sealed yet, instead of making memory,
                whatever `lend` says. Its descriptor stays the caller's, and `file` is this.

        Raises:
            ConfigError: where the memory cannot be had.
        """
        assert num_blocks > 0
        assert block_size > 0
        kv_heads = range(config.num_kv_heads) if kv_heads is None else kv_heads
        layers = range(config.num_layers) if layers is None else layers
        assert _is_part(kv_heads, config.num_kv_heads), f"{kv_heads} of {config.num_kv_heads} KV heads"
        assert _is_part(layers, config.num_layers), f"{layers} of {config.num_layers} layers"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = len(layers)
        self.num_kv_heads = len(kv_heads)
        self.head_dim = config.head_dim
        self.layout = layout
        self.dtype = dtype
        kv_dtype = kv_dtype or dtype
        assert kv_dtype in (dtype, torch.int8)
        tile = _Tile(block_size, self.head_dim, kv_dtype)
        self._block_bytes = bytes_per_block(config, block_size, kv_dtype)
        num_bytes = num_blocks * self._block_bytes
        assert memory is None or memory.num_bytes == num_bytes
        self.file: MemoryFile | None
        try:
            # The cache itself, or where a device's blocks are staged. That takes memory only for blocks that travel.
            if memory is not None:
                self._host, self.file = map_shared(memory.descriptor, num_bytes), memory
            else:
                self._host, self.file = shared_memory(num_bytes) if lend else (private_memory(num_bytes), None)
            whole = torch.frombuffer(self._host, dtype=torch.uint8).view(
                num_blocks, config.num_kv_heads, config.num_layers, tile.num_bytes
            )
            self._in_host = whole[:, kv_heads.start : kv_heads.stop, layers.start : layers.stop]
            self._tile_bytes = (
                self._in_host
                if device.type == "cpu"
                else torch.empty(self._in_host.shape, dtype=torch.uint8, device=device)
            )
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"no memory for a KV cache of {num_bytes / 2**30:.1f} GiB on {device}: configure fewer blocks"
            ) from error
        self.data, self.scales = tile.values(self._tile_bytes), tile.scales(self._tile_bytes)

    @property
    def region_bytes(self) -> int:
        """Of all blocks, what belongs to the region."""
        return self._tile_bytes.numel()

    @property
    def device(self) -> torch.device:
        return self.data.device

    # Computing

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Stores keys and values [T, num_kv_heads, head_dim] at the slots [T] of their tokens.

        Args:
            layer: Of the region's, which count from 0.
        """
        keys, values = self._tiles(layer)
        blocks, offsets = slot_mapping // self.block_size, slot_mapping % self.block_size
        if self.scales is not None:
            k, k_scales = quantize(k)
            v, v_scales = quantize(v)
            self.scales[:, :, layer][blocks, :, :, offsets] = torch.stack((k_scales, v_scales), -1)
        if self.layout.pack is None:
            keys[blocks, :, offsets] = k
            values[blocks, :, offsets] = v
        else:
            keys[blocks, :, :, offsets] = k.view(len(k), self.num_kv_heads, -1, self.layout.pack)
            values[blocks, :, offsets // self.layout.pack, :, offsets % self.layout.pack] = v

    def gather(self, layer: int, block_tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of one layer's keys and values of blocks [N, M], each [N, num_kv_heads, M * block_size, head_dim].

        Args:
            layer: Of the region's, which count from 0.
        """
        keys, values = (tiles[block_tables] for tiles in self._tiles(layer))
        if self.layout.pack is not None:
            # [N, M, heads, dim / pack, token, pack] and [N, M, heads, token / pack, dim, pack]
            keys = keys.transpose(3, 4).flatten(4)
            values = values.transpose(4, 5).flatten(3, 4)
        keys, values = keys.transpose(1, 2).flatten(2, 3), values.transpose(1, 2).flatten(2, 3)
        if self.scales is None:
            return keys, values
        # [N, M, heads, K or V, token] to [K or V, N, heads, M * token]
        k_scales, v_scales = self.scales[:, :, layer][block_tables].permute(3, 0, 2, 1, 4).flatten(3)
        return dequantize(keys, k_scales, self.dtype), dequantize(values, v_scales, self.dtype)

    def _tiles(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's K and V, [num_blocks, num_kv_heads, *tile], the tile in its layout's dimensions."""
        keys, values = self.data[:, :, layer].unbind(2)
        if self.layout.pack is None:
            return keys, values
        shape = (self.num_blocks, self.num_kv_heads)
        pack = self.layout.pack
        return (
            keys.view(*shape, self.head_dim // pack, self.block_size, pack),
            values.view(*shape, self.block_size // pack, self.head_dim, pack),
        )

    # Travelling: the BlockMemory protocol.

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    def place(self, block_id: int) -> int:
        """Where in `file` a block begins, in bytes."""
        return block_id * self._block_bytes

    def view(self, block_id: int) -> memoryview:
        """The writable bytes of one whole block; see `BlockMemory`."""
        assert 0 <= block_id < self.num_blocks
        return self._host[block_id * self._block_bytes : (block_id + 1) * self._block_bytes]

    def to_host(self, block_ids: Sequence[int]) -> None:
        """Before views are read: the region of these blocks goes to its place in them."""
        if self.device.type != "cpu" and block_ids:
            ids = torch.tensor(block_ids)
            self._in_host[ids] = self._tile_bytes.index_select(0, ids.to(self.device)).cpu()

    def to_device(self, block_ids: Sequence[int]) -> None:
        """After views were written, before the blocks are used."""
        if self.device.type != "cpu" and block_ids:
            ids = torch.tensor(block_ids)
            self._tile_bytes.index_copy_(0, ids.to(self.device), self._in_host[ids].to(self.device))


def _is_part(part: range, whole: int) -> bool:
    return part.step == 1 and 0 <= part.start < part.stop <= whole
