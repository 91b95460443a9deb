"""deepmoe evaluate: timm's accuracy, the gates' numbers, and errors that name the mistake."""

import argparse
import csv
import json

import numpy as np
import pytest
import timm
import torch
from image_folders import save_images
from small_networks import randomise
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import nn

from deepmoe_plugin import count_macs, gate_statistics, set_budget
from deepmoe_plugin.cli import evaluate
from deepmoe_plugin.handover import measure_handover

CLASSES = ['apple', 'bear', 'crab', 'dolphin', 'elephant', 'fox']
NAME = 'wide_deepmoe_resnet20_cifar'
KWARGS = {'layers': (1, 1, 1)}
ARGUMENTS = [NAME, '--model-kwargs', 'layers=(1,1,1)', '--batch-size', '7', '--workers', '0']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of six classes, of different sizes, in numbers that fill no last batch."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        heights = range(40, 52 + 4 * (label % 2), 4)
        save_images(folder / 'val' / name, (rng.normal(60 + 20 * label, 60, (h, 36, 3)) for h in heights))
    return folder


def trained(gated: bool = True) -> nn.Module:
    """A network whose images differ in their logits; its gates differ as well, unless it is dense."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=6, gated=gated, **KWARGS)
    return randomise(model).eval()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint') / 'model.pth'
    torch.save(trained().state_dict(), path)
    return path


def reference(model: nn.Module, folder):
    """Logits and labels of a plain loop over timm's own loader, and timm's accuracies."""
    config = resolve_data_config({}, model=model)
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    loader = create_loader(
        create_dataset('', root=str(folder), split='validation'), batch_size=4, use_prefetcher=False, num_workers=0,
        **{name: config[name] for name in names},
    )  # fmt: skip
    top1, top5, batches = AverageMeter(), AverageMeter(), []
    with torch.no_grad():
        for images, labels in loader:
            logits = model(images)
            for meter, value in zip((top1, top5), accuracy(logits, labels, topk=(1, 5)), strict=True):
                meter.update(value.item(), len(images))
            batches.append((images, labels))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]), top1.avg, top5.avg


@pytest.fixture(scope='module')
def summary(folder, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')
    arguments = ['--checkpoint', str(checkpoint), '--data-dir', str(folder)]
    files = ['--json', str(out / 'new/result.json'), '--csv', str(out / 'new/images.csv')]
    result = evaluate.main([*ARGUMENTS, *arguments, *files])
    return result, out / 'new'


@pytest.mark.parametrize('gated', [True, False])
def test_accuracy_is_that_of_timm(folder, tmp_path, gated):
    """Gates of one, dense weights: the dense network's accuracy."""
    dense = trained(gated=False)
    torch.save(dense.state_dict(), tmp_path / 'dense.pth')
    _, _, top1, top5 = reference(dense, folder)
    arguments = [*ARGUMENTS[:3], f'gated={gated}', *ARGUMENTS[3:]]
    result = evaluate.main([*arguments, '--checkpoint', str(tmp_path / 'dense.pth'), '--data-dir', str(folder)])
    assert 0 < result['top1'] < result['top5'] < 100
    assert (result['top1'], result['top5']) == (pytest.approx(top1), pytest.approx(top5))
    assert result.get('kept_experts', {'mean': 1.0})['mean'] == 1.0
    assert ('kept_experts' in result) == gated
    assert result['gmacs']['mean'] == pytest.approx(result['gmacs']['dense'])


def test_numbers_of_all_images(summary, folder):
    result, _ = summary
    model = trained()
    x, labels, top1, _ = reference(model, folder)
    macs, stats = count_macs(model, x), gate_statistics(model, x)
    assert result['images'] == len(labels) == 21
    assert result['top1'] == pytest.approx(top1)
    for key, values in (('gmacs', macs.total.double() / 1e9), ('kept_experts', stats.by_image().double())):
        assert values.std() > 0
        for name, expected in (('mean', values.mean()), ('std', values.std(correction=0)), ('min', values.min())):
            assert result[key][name] == pytest.approx(expected.item(), rel=1e-4), (key, name)
    assert result['gmacs']['without_shortcuts'] == pytest.approx(macs.without_shortcuts.double().mean().item() / 1e9)
    assert sum(result['gmacs']['by_group'].values()) == pytest.approx(result['gmacs']['mean'])
    assert 0 < result['dynamic_experts'] < 1
    assert result['dynamic_experts'] == pytest.approx(stats.dynamic_experts, rel=1e-5)
    assert result['width'] == 2


def test_what_the_network_knows_beyond_its_embedding(summary, folder):
    result, _ = summary
    model = trained()
    x, labels, _, _ = reference(model, folder)
    with torch.no_grad():
        expected = measure_handover(model.gating, model.gating.embedding(x), model(x).argmax(1), labels)
    assert result['handover'] == pytest.approx(expected.numbers(), rel=1e-6)
    assert result['handover']['is_fitted']
    text = evaluate.format_summary(result)
    assert 'embedding alone (a linear read-out of its mixture): top-1' in text
    assert f'where it is wrong, the network is right on {100 * expected.right_where_wrong:.2f} %' in text


def test_numbers_of_each_class_and_layer(summary, folder):
    result, _ = summary
    model = trained()
    x, labels, _, _ = reference(model, folder)
    macs, stats = count_macs(model, x), gate_statistics(model, x)
    hits = model(x).argmax(1) == labels
    assert list(result['by_class']) == CLASSES
    for label, row in enumerate(result['by_class'].values()):
        chosen = labels == label
        assert row['images'] == chosen.sum()
        assert row['top1'] == pytest.approx(100 * hits[chosen].float().mean().item())
        assert row['gmacs']['mean'] == pytest.approx(macs.total[chosen].double().mean().item() / 1e9)
        assert row['kept_experts']['std'] == pytest.approx(stats.by_image()[chosen].std(correction=0).item(), abs=1e-5)
    assert len({row['gmacs']['mean'] for row in result['by_class'].values()}) > 1
    assert list(result['by_layer']) == list(stats.layers)
    for (layer, row), kept in zip(result['by_layer'].items(), stats.kept.split(stats.widths, 1), strict=True):
        assert row['experts'] == kept.shape[1]
        assert row['dead'] == stats.dead()[layer]
        assert row['kept_experts']['mean'] == pytest.approx(stats.by_layer()[layer], rel=1e-4)
        assert row['gmacs']['mean'] == pytest.approx(macs.by_module[layer].double().mean().item() / 1e9, rel=1e-6)
    assert sum(row['dead'] for row in result['by_layer'].values()) > 0


def test_files(summary, folder):
    result, out = summary
    saved = json.loads((out / 'result.json').read_text())
    assert saved['gmacs'] == result['gmacs']
    rows = list(csv.DictReader((out / 'images.csv').open()))
    assert len(rows) == result['images']
    assert all((folder / 'val' / row['file']).is_file() and row['file'].startswith(row['class']) for row in rows)
    assert np.mean([float(row['gmacs']) for row in rows]) == pytest.approx(result['gmacs']['mean'], rel=1e-5)
    assert np.mean([row['class'] == row['predicted'] for row in rows]) == pytest.approx(result['top1'] / 100)


def test_table_on_screen(summary):
    result, _ = summary
    text = evaluate.format_summary(result)
    assert f'top-1 {result["top1"]:.2f} %' in text
    assert sum(line.startswith('| layer') for line in text.splitlines()) == 4
    assert sum(line.startswith(tuple(f'| {name} ' for name in CLASSES)) for line in text.splitlines()) == 6
    many = {**result, 'by_class': {f'{i}': result['by_class']['fox'] for i in range(30)}}
    assert '30 classes: see --json' in evaluate.format_summary(many)


def test_sparse_execution_gives_the_same_numbers(summary, folder, checkpoint, monkeypatch):
    masked, _ = summary
    batches = []
    sparsify = evaluate.deepmoe_plugin.sparsify

    def watched(model):
        sparse = sparsify(model)
        sparse.register_forward_hook(lambda _module, args, _output: batches.append(len(args[0])))
        return sparse

    monkeypatch.setattr(evaluate.deepmoe_plugin, 'sparsify', watched)
    arguments = ['--checkpoint', str(checkpoint), '--data-dir', str(folder), '--sparse']
    sparse = evaluate.main([*ARGUMENTS, *arguments])
    assert batches == [7, 7, 7]
    for key in ('top1', 'top5', 'gmacs', 'kept_experts', 'by_class', 'by_layer'):
        assert sparse[key] == masked[key]


def test_budgets_of_one_checkpoint(folder, checkpoint, tmp_path, capsys):
    model = trained()
    set_budget(model, reference(model, folder)[0], macs=0.5)
    torch.save(model.state_dict(), tmp_path / 'curve.pth')
    arguments = [*ARGUMENTS, '--data-dir', str(folder), '--macs', '0.35', '--checkpoint']
    result = evaluate.main([*arguments, str(tmp_path / 'curve.pth')])
    groups = result['gmacs']['by_group']
    gating = groups['embedding'] + groups['gate_heads']
    assert (result['gmacs']['mean'] - gating) / (result['gmacs']['dense'] - gating) == pytest.approx(0.35, abs=0.02)
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, str(checkpoint)])
    assert 'no budget curve' in capsys.readouterr().err


def test_settings_of_a_training_run(summary, folder, checkpoint, tmp_path):
    """timm's train.py leaves all of its options in args.yaml."""
    settings = {
        'model': NAME,
        'model_kwargs': {'layers': [1, 1, 1]},
        'num_classes': 6,
        'img_size': 48,
        'mean': [0.5] * 3,
    }
    (tmp_path / 'args.yaml').write_text(json.dumps({**settings, 'mean': [0.5] * 3}))
    arguments = ['--checkpoint', str(checkpoint), '--data-dir', str(folder), '--workers', '0']
    result = evaluate.main([str(tmp_path / 'args.yaml'), *arguments])
    assert result['gmacs']['dense'] == pytest.approx(2.25 * summary[0]['gmacs']['dense'], rel=0.01)
    smaller = evaluate.main([str(tmp_path / 'args.yaml'), *arguments, '--img-size', '32'])
    assert smaller['gmacs']['dense'] == summary[0]['gmacs']['dense']
    assert smaller['gmacs']['mean'] != summary[0]['gmacs']['mean']  # normalised differently


@pytest.mark.parametrize('use_ema', [False, True])
def test_weights_of_a_training_checkpoint(folder, tmp_path, use_ema):
    model = trained()
    other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    stored = {'state_dict': other, 'state_dict_ema': model.state_dict()}
    torch.save({**stored, 'args': argparse.Namespace(lr=1), 'epoch': 1}, tmp_path / 'last.pth.tar')
    arguments = ['--checkpoint', str(tmp_path / 'last.pth.tar'), '--data-dir', str(folder)]
    result = evaluate.main([*ARGUMENTS, *arguments, *(['--use-ema'] if use_ema else [])])
    assert (result['kept_experts']['mean'] > 0) == use_ema


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(network='wide_deepmoe_resnet21_cifar'), 'Similar: '),
        (dict(network='none.yaml'), 'no file none.yaml'),
        (dict(data_dir='/nowhere'), 'no folder /nowhere'),
        (dict(checkpoint='none.pth'), 'no checkpoint none.pth'),
        (dict(num_classes='3'), '6 classes, num_classes is 3'),
        (dict(num_classes='9'), 'num_classes'),
        (dict(network='wide_deepmoe_resnet32_cifar'), 'not a checkpoint of wide_deepmoe_resnet32_cifar'),
    ],
)
def test_mistakes_are_named(folder, checkpoint, change, message, capsys):
    given = {'network': NAME, 'data_dir': str(folder), 'checkpoint': str(checkpoint), **change}
    network = given.pop('network')
    kwargs = [] if network != NAME else ARGUMENTS[1:3]
    options = [text for name, value in given.items() for text in (f'--{name.replace("_", "-")}', value)]
    with pytest.raises(SystemExit):
        evaluate.main([network, *kwargs, *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('network', 'more', 'message'),
    [
        (NAME, ['--checkpoint', 'some.pth'], '--pretrained and --checkpoint contradict each other'),
        (NAME, [], 'tell 100 classes apart, not 6: give --num-classes 100'),
        ('wide_deepmoe_resnet32_cifar', [], 'no pretrained weights of wide_deepmoe_resnet32_cifar'),
    ],
)
def test_mistakes_about_pretrained_weights_are_named(folder, network, more, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([network, '--pretrained', '--data-dir', str(folder), *more])
    assert message in capsys.readouterr().err


def test_weights_that_come_with_the_package(tmp_path):
    for label in range(100):
        save_images(tmp_path / f'val/{label:02}', [np.random.default_rng(label).normal(120, 60, (32, 32, 3))])
    result = evaluate.main([NAME, '--pretrained', '--data-dir', str(tmp_path), '--workers', '0'])
    assert result['kept_experts']['mean'] < 0.8  # all of a new network's
