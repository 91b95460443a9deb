"""deepmoe benchmark with random gates, with the gates of a checkpoint, and with wrong arguments."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import save_images
from PIL import Image
from small_networks import randomise

ROOT = Path(__file__).parents[1]
MODEL = ('wide_deepmoe_resnet20_cifar', '--size', '32', '--num-classes', '10', '--repeats', '2', '--warmup', '1')


def benchmark(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'deepmoe_plugin', 'benchmark', *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize('experts_per_gate', [1, 8])
def test_random_gates(tmp_path, experts_per_gate):
    groups = ('--model-kwargs', f'experts_per_gate={experts_per_gate}')
    done = benchmark(*MODEL, *groups, '--kept', '0.25', '0.75', '--batch', '2', '--out', str(tmp_path / 'result'))
    assert done.returncode == 0, done.stderr
    with (tmp_path / 'result' / 'benchmark.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row['kept']) for row in rows] == [0.25, 0.75]
    for row in rows:
        times = [float(row[f'{name}_ms']) for name in ('masked', 'sparse', 'thin', 'thin_fused', 'base')]
        assert min(times) > 0
        assert float(row['speedup']) > 0
    assert float(rows[0]['thin_gmacs']) < float(rows[1]['thin_gmacs'])
    setting = json.loads((tmp_path / 'result' / 'benchmark.json').read_text())['setting']
    assert setting['torch'] == torch.__version__
    assert Image.open(tmp_path / 'result' / 'benchmark.png').width > 100


def test_engines(tmp_path):
    pytest.importorskip('onnxruntime')
    few = ('--variants', 'sparse', 'thin', '--engines', 'onnxruntime', '--out', str(tmp_path / 'result'))
    done = benchmark(*MODEL, *few)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / 'result' / 'benchmark.json').read_text())['rows']
    assert row['thin_onnxruntime_ms'] > 0
    assert row['speedup_best_engine'] == 'wide_onnxruntime'
    assert row['efficiency_best'] > 0
    assert 'speed-up over best dense' in done.stdout


def test_a_missing_engine_is_skipped_with_a_word(tmp_path):
    done = benchmark(*MODEL, '--variants', 'sparse', '--engines', 'onnxruntime', '--dtype', 'bfloat16')
    assert done.returncode == 0, done.stderr
    assert 'Without ideal thin, onnxruntime: ' in done.stdout


def test_gates_of_a_checkpoint(tmp_path):
    model = randomise(timm.create_model(MODEL[0], num_classes=10))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    for i in range(3):
        save_images(tmp_path / 'images' / str(i), [np.random.default_rng(i).integers(0, 256, (32, 32, 3))])
    trained = ('--checkpoint', str(tmp_path / 'model.pth'), '--images', str(tmp_path / 'images'))
    done = benchmark(*MODEL, *trained, '--out', str(tmp_path / 'result'))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / 'result' / 'benchmark.json').read_text())['rows']
    assert 0 < row['kept'] < 1
    assert row['speedup'] > 0


def test_pretrained_weights_bring_size_and_classes(tmp_path):
    save_images(tmp_path / 'images' / 'any', [np.random.default_rng(i).integers(0, 256, (32, 32, 3)) for i in range(3)])
    few = ('--variants', 'masked', 'sparse', '--repeats', '2', '--warmup', '1', '--out', str(tmp_path / 'result'))
    done = benchmark(MODEL[0], '--pretrained', '--images', str(tmp_path / 'images'), *few)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / 'result' / 'benchmark.json').read_text())['rows']
    assert row['size'] == '32x32'
    assert 0 < row['kept'] < 1


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('--kept', '1.5'), '--kept'),
        (('--size', '1', '2', '3'), '--size'),
        (('--checkpoint', 'model.pth'), '--images'),
        (('--pretrained',), '--images'),
        (('--images', 'x'), '--pretrained'),
        (('--checkpoint', 'model.pth', '--images', 'x', '--kept', '0.5'), '--kept'),
        (('--pretrained', '--images', 'x', '--kept', '0.5'), '--kept'),
    ],
)
def test_wrong_arguments(args, message):
    done = benchmark('wide_deepmoe_resnet20_cifar', *args)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
