"""Folders of small images, as timm and mmseg read them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def save_images(folder: Path, pictures: Iterable[np.ndarray]) -> None:
    """Write pictures (H, W, 3), their values cut to a byte, to 0.png, 1.png, ... in a folder that is made for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
