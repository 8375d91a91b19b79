"""A step's arrays to the device, in one copy."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# Arrays begin at multiples of this many words: 16 bytes, so that kernels are compiled for one alignment.
_ALIGN_WORDS = 2


def aligned(num_words: int) -> int:
    """Words that an array of `num_words` takes in an upload."""
    return -(-num_words // _ALIGN_WORDS) * _ALIGN_WORDS


class PinnedWords:
    """int64 words in page-locked memory, from which the device copies while the host goes on.

    Whoever fills `words` calls `wait` before: what was sent last may still be on its way.
    """

    def __init__(self, device: torch.device, num_words: int) -> None:
        on_cuda = device.type == "cuda"
        self._host = torch.zeros(num_words, dtype=torch.int64, pin_memory=on_cuda)
        self._sent = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        self.words: npt.NDArray[np.int64] = self._host.numpy()

    def wait(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, target: torch.Tensor) -> None:
        """Begins to copy the first words to `target`, as many as that has."""
        target.copy_(self._host[: len(target)], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Uploader:
    """Arrays of any sizes, packed and sent together. Not thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = PinnedWords(device, 1 << 12)

    def upload(self, arrays: Sequence[npt.NDArray[np.int64]]) -> list[torch.Tensor]:
        """The arrays on the device, each of its own shape, in memory of their own."""
        sizes = [aligned(array.size) for array in arrays]
        total = sum(sizes)
        self._pinned.wait()
        if total > len(self._pinned.words):
            self._pinned = PinnedWords(self._device, 2 * total)
        packed = torch.empty(total, dtype=torch.int64, device=self._device)
        tensors = []
        begin = 0
        for array, size in zip(arrays, sizes, strict=True):
            self._pinned.words[begin : begin + array.size] = array.ravel()
            tensors.append(packed[begin : begin + array.size].view(array.shape))
            begin += size
        self._pinned.send(packed)
        return tensors
