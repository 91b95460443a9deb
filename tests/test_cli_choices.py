"""Figures and metrics of networks whose experts mix, against a direct computation."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_digits import write_idx

from deepmoe_plugin.cli import analyze, evaluate
from deepmoe_plugin.cli.choices import group_means, read_shifts
from deepmoe_plugin.cli.jittered_digits import main as write
from deepmoe_plugin.digits import draw_shifts, read_digits, shift
from deepmoe_plugin.information import gate_entropy, mutual_information, use_entropy


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jittered digits in `data`, and weights of a stacked and of a specialised network."""
    folder = tmp_path_factory.mktemp('choices')
    write_idx(folder / 'mnist/MNIST/raw', 'train', 40, 0)
    write_idx(folder / 'mnist/MNIST/raw', 't10k', 300, 1)
    write([str(folder / 'data'), '--source', str(folder / 'mnist')])
    torch.manual_seed(0)
    for name, kwargs in (('dmoe_4x50_4x20', {}), ('moe_mnist', dict(img_size=36))):
        model = timm.create_model(name, **kwargs)
        for parameter in model.parameters():
            parameter.data *= 3
        save_file(model.state_dict(), folder / f'{name}.safetensors')
    return folder


def arguments(folder: Path, network: str) -> list[str]:
    yaml = folder / f'{network}.yaml'
    kwargs = 'model_kwargs: {img_size: 36}\n' if network == 'moe_mnist' else ''
    yaml.write_text(f'model: {network}\ninput_size: [1, 36, 36]\n{kwargs}')
    checkpoint = str(folder / f'{network}.safetensors')
    data = ['--data-dir', str(folder / 'data'), '--workers', '0', '--device', 'cpu']
    return [str(yaml), '--checkpoint', checkpoint, *data]


def look(folder: Path, network: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates, predictions, labels and shifts of the validation images, in the order of their files."""
    digits = read_digits(str(folder / 'mnist'), 'validation')
    shifts = draw_shifts(len(digits.labels), 'validation')
    x = torch.from_numpy(shift(digits.images, shifts)).float() / 255
    model = timm.create_model(network, **({'img_size': 36} if network == 'moe_mnist' else {})).eval()
    model.load_state_dict(timm.models.load_state_dict(str(folder / f'{network}.safetensors')))
    record = model.look(((x - 0.1307) / 0.3081)[:, None])
    return record.gates, record.predicted, torch.from_numpy(digits.labels).long(), torch.from_numpy(shifts)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_where_what(folder: Path, tmp_path: Path) -> None:
    analyze.main(['where-what', *arguments(folder, 'dmoe_4x50_4x20'), '--out', str(tmp_path)])
    assert (tmp_path / 'where-what.png').stat().st_size > 10_000
    gates, _, labels, shifts = look(folder, 'dmoe_4x50_4x20')
    rows = read(tmp_path / 'where-what.csv')
    places = (shifts[:, 1] + 4) * 9 + shifts[:, 0] + 4
    for layer in (1, 2):
        own = [row for row in rows if row['layer'] == str(layer)]
        bits = {row['value']: float(row['number']) for row in own if row['of'] == 'information in bits'}
        chosen = gates[layer - 1].argmax(1)
        assert bits['shift'] == pytest.approx(mutual_information(chosen, places).item(), abs=1e-4)
        assert bits['class'] == pytest.approx(mutual_information(chosen, labels).item(), abs=1e-4)
        by_class = [float(row['number']) for row in own if row['of'] == 'mean gate by class' and row['expert'] == '2']
        expected = [gates[layer - 1][labels == label, 2].mean().item() for label in range(10)]
        assert by_class == pytest.approx(expected, abs=1e-4)
        (dx, dy), index = shifts[0].tolist(), (places == places[0]).nonzero()[:, 0]
        (value,) = (
            float(row['number'])
            for row in own
            if (row['of'], row['value'], row['expert']) == ('mean gate by shift', f'{dx} {dy}', '1')
        )
        assert value == pytest.approx(gates[layer - 1][index, 1].mean().item(), abs=1e-4)


def test_pairs(folder: Path, tmp_path: Path) -> None:
    analyze.main(['pairs', *arguments(folder, 'dmoe_4x50_4x20'), '--out', str(tmp_path)])
    gates, _, labels, _ = look(folder, 'dmoe_4x50_4x20')
    rows = read(tmp_path / 'pairs.csv')
    assert len(rows) == 16
    assert sum(float(row['use']) for row in rows) == pytest.approx(1, abs=1e-4)
    row = next(row for row in rows if (row['first'], row['second']) == ('1', '3'))
    product = gates[0][:, 1] * gates[1][:, 3]
    assert float(row['use']) == pytest.approx(product.mean().item(), abs=1e-5)
    best = int(product.argmax())
    assert row['strongest'].split()[0] == f'{labels[best]}/{best:05d}.png'
    assert len(row['strongest'].split()) == 9


@pytest.mark.parametrize('network', ['dmoe_4x50_4x20', 'moe_mnist'])
def test_choice_and_metrics_of_evaluate(folder: Path, tmp_path: Path, network: str) -> None:
    analyze.main(['choice', *arguments(folder, network), '--out', str(tmp_path)])
    summary = evaluate.main([*arguments(folder, network), '--json', str(tmp_path / 'e.json')])
    assert json.loads((tmp_path / 'e.json').read_text())['mixtures'] == summary['mixtures']
    gates, predicted, labels, _ = look(folder, network)
    rows = read(tmp_path / 'choice.csv')
    assert len(summary['mixtures']) == len(gates)
    for number, (layer, metrics) in enumerate(zip(gates, summary['mixtures'], strict=True), 1):
        chosen = layer.argmax(1)
        expected = {
            'gate_entropy': gate_entropy(layer),
            'use_entropy': use_entropy(layer),
            'prediction_information': mutual_information(chosen, predicted),
            'class_information': mutual_information(chosen, labels),
        }
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value.item(), abs=1e-4)
            (shown,) = (r['chosen'] for r in rows if (r['layer'], r['class']) == (str(number), name))
            assert float(shown) == pytest.approx(value.item(), abs=1e-4)
        (part,) = (r['chosen'] for r in rows if (r['layer'], r['class'], r['expert']) == (str(number), '7', '0'))
        assert float(part) == pytest.approx((chosen[labels == 7] == 0).float().mean().item(), abs=1e-5)
    assert summary['gmacs']['mean'] > 0


def test_latent_mixture_of_a_deepmoe_network_is_measured_too(folder: Path, tmp_path: Path) -> None:
    yaml = tmp_path / 'small.yaml'
    kwargs = '{in_chans: 1, layers: [1, 1, 1], num_latent_experts: 6}'
    options = 'input_size: [1, 36, 36]\nmean: [0.1]\nstd: [0.3]\n'
    yaml.write_text(f'model: narrow_deepmoe_resnet20_cifar\n{options}model_kwargs: {kwargs}\n')
    data = ['--data-dir', str(folder / 'data'), '--workers', '0', '--device', 'cpu']
    summary = evaluate.main([str(yaml), *data])
    assert summary['mixtures'][0]['experts'] == 6
    assert summary['mixtures'][0]['gate_entropy'] == pytest.approx(2.585, abs=1e-3)


@pytest.mark.parametrize(
    ('command', 'network', 'match'),
    [
        ('where-what', 'dmoe_dnn_4x50_4x20', 'mixes no experts'),
        ('pairs', 'dmoe_4x100', 'two layers'),
    ],
)
def test_networks_without_choices_are_refused(
    folder: Path, tmp_path: Path, command: str, network: str, match: str, capsys: pytest.CaptureFixture
) -> None:
    data = ['--data-dir', str(folder / 'data'), '--workers', '0', '--device', 'cpu', '--out', str(tmp_path)]
    with pytest.raises(SystemExit):
        analyze.main([command, network, *data])
    assert match in capsys.readouterr().err


def test_missing_shifts_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='jittered-digits'):
        read_shifts(tmp_path, 'validation', ['0/00000.png'])
    with pytest.raises(ValueError, match='test'):
        read_shifts(folder / 'data', 'test', ['0/00000.png'])


def test_group_means() -> None:
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    means = group_means(gates, torch.tensor([0, 0, 2]), 3)
    torch.testing.assert_close(means[[0, 2]], torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    assert means[1].isnan().all()
