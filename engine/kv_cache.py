"""The KV cache's tensor: where the keys and values of every block lie, how they get there, and how they leave.

A block is one contiguous run of bytes over all layers, so it travels as it lies: [layer][K, V][KV head][tile]. Of the
tile, the tokens of one block in one layer and head, there are two orders:

    plain   K and V [token][dim]
    dot     K [dim / pack][token][pack], V [token / pack][dim][pack]

The second is what a CPU's dot products read: pack is how many values one multiply-add takes (2 of bfloat16, else 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.model_config import ModelConfig
from pdmesh.errors import ConfigError
from pdmesh.kv_memory import private_memory, shared_memory
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
        return "block.layer.kv.head.token.dim" if self.pack is None else f"block.layer.kv.head.dot{self.pack}"


PLAIN = KVLayout()


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: K and V of `block_size` tokens over all layers."""
    return config.num_layers * 2 * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of `num_blocks` blocks, and the `BlockMemory` through which blocks travel.

    Memory is taken from the system as it is first written. What was never written is garbage and may be NaN: whoever
    reads blocks must discard the tokens past a sequence's end, not weigh them by zero.

    Attributes:
        data: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], contiguous; index 0 of the third is K.
            The last two dimensions are a tile's: what they say of tokens and dims holds in the plain layout only.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        layout: KVLayout = PLAIN,
        lend: bool = False,
    ) -> None:
        """With `lend`, the blocks' bytes lie in `file` for other processes of this host to read.

        Raises ConfigError where the memory cannot be had.
        """
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = config.num_layers
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.layout = layout
        self._block_bytes = bytes_per_block(config, block_size, dtype)
        self.file: MemoryFile | None
        shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        try:
            # [num_blocks, block_bytes]: the cache itself, or where a device's blocks are staged. That takes memory
            # only for blocks that travel.
            num_bytes = num_blocks * self._block_bytes
            memory, self.file = shared_memory(num_bytes) if lend else (private_memory(num_bytes), None)
            host = torch.frombuffer(memory, dtype=torch.uint8)
            self._host = host.view(num_blocks, self._block_bytes)
            self.data = (
                host.view(dtype).view(shape) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
            )
        except (RuntimeError, OSError) as error:
            size = num_blocks * self._block_bytes / 2**30
            raise ConfigError(
                f"no memory for a KV cache of {size:.1f} GiB on {device}: configure fewer blocks"
            ) from error
        self._host_bytes = self._host.numpy().data.cast("B")

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    # Computing

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Stores keys and values [T, num_kv_heads, head_dim] of one layer at the slots [T] of their tokens."""
        keys, values = self._tiles(layer)
        blocks, offsets = slot_mapping // self.block_size, slot_mapping % self.block_size
        if self.layout.pack is None:
            keys[blocks, :, offsets] = k
            values[blocks, :, offsets] = v
        else:
            keys[blocks, :, :, offsets] = k.view(len(k), self.num_kv_heads, -1, self.layout.pack)
            values[blocks, :, offsets // self.layout.pack, :, offsets % self.layout.pack] = v

    def gather(self, layer: int, block_tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of one layer's keys and values of blocks [N, M], each [N, num_kv_heads, M * block_size, head_dim]."""
        keys, values = (tiles[block_tables] for tiles in self._tiles(layer))
        if self.layout.pack is not None:
            # [N, M, heads, dim / pack, token, pack] and [N, M, heads, token / pack, dim, pack]
            keys = keys.transpose(3, 4).flatten(4)
            values = values.transpose(4, 5).flatten(3, 4)
        return keys.transpose(1, 2).flatten(2, 3), values.transpose(1, 2).flatten(2, 3)

    def _tiles(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's K and V, [num_blocks, num_kv_heads, *tile], the tile in its layout's dimensions."""
        keys, values = self.data[:, layer, 0], self.data[:, layer, 1]
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

    def view(self, block_id: int) -> memoryview:
        """The writable bytes of one block; see `BlockMemory`."""
        assert 0 <= block_id < self.num_blocks
        return self._host_bytes[block_id * self._block_bytes : (block_id + 1) * self._block_bytes]

    def to_host(self, block_ids: Sequence[int]) -> None:
        """Before views are read."""
        if self.device.type != "cpu" and block_ids:
            ids = torch.tensor(block_ids)
            self._host[ids] = self._device_bytes.index_select(0, ids.to(self.device)).cpu()

    def to_device(self, block_ids: Sequence[int]) -> None:
        """After views were written, before the blocks are used."""
        if self.device.type != "cpu" and block_ids:
            ids = torch.tensor(block_ids)
            self._device_bytes.index_copy_(0, ids.to(self.device), self._host[ids].to(self.device))

    @property
    def _device_bytes(self) -> torch.Tensor:
        return self.data.view(torch.uint8).view(self.num_blocks, self._block_bytes)
