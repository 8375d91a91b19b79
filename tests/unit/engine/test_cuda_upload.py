"""What is packed for the device arrives as it was."""

import numpy as np
import torch

from engine.cuda.upload import Uploader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_arrays_arrive_in_their_shapes() -> None:
    arrays = [np.arange(7), np.arange(12).reshape(3, 4), np.zeros((3, 0), np.int64), np.array([5])]
    tensors = Uploader(DEVICE).upload(arrays)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.device.type == DEVICE.type
        assert tensor.shape == array.shape
        assert tensor.tolist() == array.tolist()
        assert tensor.data_ptr() % 16 == 0


def test_a_transposed_array_arrives_as_it_reads() -> None:
    array = np.arange(12).reshape(3, 4).T
    assert Uploader(DEVICE).upload([array])[0].tolist() == array.tolist()


def test_uploads_of_any_size_do_not_disturb_each_other() -> None:
    uploader = Uploader(DEVICE)
    rounds = [np.random.default_rng(size).integers(1 << 40, size=size) for size in (10, 50_000, 3, 200_000, 1)]
    arrived = [uploader.upload([words])[0] for words in rounds]
    for words, tensor in zip(rounds, arrived, strict=True):
        assert (tensor.cpu().numpy() == words).all()
