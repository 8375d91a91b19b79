"""The KV cache's tensor: where the keys and values of every block lie, how they get there, and how they leave."""

from collections.abc import Sequence

import torch

from engine.model_config import ModelConfig
from pdmesh.errors import ConfigError

# Outermost first. A block is one contiguous run of bytes over all layers, so it travels as it lies.
KV_LAYOUT = "block.layer.kv.head.token.dim"


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: K and V of `block_size` tokens over all layers."""
    return config.num_layers * 2 * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of `num_blocks` blocks, and the `BlockMemory` through which blocks travel.

    Memory is taken from the system as it is first written. What was never written is garbage and may be NaN: whoever
    reads blocks must discard the tokens past a sequence's end, not weigh them by zero.

    Attributes:
        data: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], contiguous; index 0 of the third is K.
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises ConfigError where the memory cannot be had."""
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = config.num_layers
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self._block_bytes = bytes_per_block(config, block_size, dtype)
        shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        try:
            self.data = torch.empty(shape, dtype=dtype, device=device)
            # [num_blocks, block_bytes]: the cache itself, or where a device's blocks are staged. That takes memory
            # only for blocks that travel.
            self._host = (
                self._device_bytes
                if device.type == "cpu"
                else torch.empty(num_blocks, self._block_bytes, dtype=torch.uint8)
            )
        except RuntimeError as error:
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

    # Computing: tokens and runs of tokens as rows of one matrix, so that each layer's access is one indexing call.

    def token_rows(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        """[2, T * num_kv_heads] int64: rows of layer 0's K and V of each slot, for `write`. Valid for every layer."""
        blocks = slot_mapping // self.block_size
        offsets = slot_mapping % self.block_size
        head_rows = torch.arange(self.num_kv_heads, device=self.device) * self.block_size
        rows = (blocks * (self.num_layers * self._layer_tokens) + offsets).unsqueeze(-1) + head_rows
        return torch.stack((rows.flatten(), rows.flatten() + self.num_kv_heads * self.block_size))

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, token_rows: torch.Tensor) -> None:
        """Stores keys and values [T, num_kv_heads, head_dim] of one layer where `token_rows` says."""
        rows = token_rows + layer * self._layer_tokens
        flat = self.data.view(-1, self.head_dim)
        flat.index_copy_(0, rows[0], k.reshape(-1, self.head_dim))
        flat.index_copy_(0, rows[1], v.reshape(-1, self.head_dim))

    def run_rows(self, block_tables: torch.Tensor) -> torch.Tensor:
        """[2 * N * num_kv_heads * M] int64: rows of layer 0's K and V of blocks [N, M], for `read`.

        Ordered so that the runs of one sequence and head, read one after the other, are its tokens in order.
        """
        heads = torch.arange(2 * self.num_kv_heads, device=self.device).view(2, 1, self.num_kv_heads, 1)
        first = block_tables * (self.num_layers * 2 * self.num_kv_heads)
        return (first[None, :, None, :] + heads).flatten()

    def read(self, layer: int, run_rows: torch.Tensor, out: torch.Tensor) -> None:
        """Copies one layer's K and V, as `run_rows` orders them, to `out` [rows, block_size * head_dim]."""
        runs = self.data.view(-1, self.block_size * self.head_dim)
        torch.index_select(runs, 0, run_rows + layer * 2 * self.num_kv_heads, out=out)

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
    def _layer_tokens(self) -> int:
        """Rows of head_dim that one layer of one block takes."""
        return 2 * self.num_kv_heads * self.block_size

    @property
    def _device_bytes(self) -> torch.Tensor:
        return self.data.view(torch.uint8).view(self.num_blocks, self._block_bytes)
