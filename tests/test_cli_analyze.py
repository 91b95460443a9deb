"""deepmoe analyze: every figure of a small trained network, and the numbers behind it."""

import csv
import json
import math

import numpy as np
import pytest
import timm
import torch
from image_folders import save_images
from PIL import Image
from small_networks import FixedGates
from torch import nn

import deepmoe_plugin
from deepmoe_plugin import count_macs, gate_statistics
from deepmoe_plugin.cli import analyze, evaluate

CLASSES = ['blue_dark', 'blue_light', 'red_dark', 'red_light']
GROUPS = {name: name.split('_')[0] for name in CLASSES}
SETTINGS = {
    'model': 'wide_deepmoe_resnet20_cifar',
    'model_kwargs': {'layers': [1, 1, 1], 'num_latent_experts': 8},
    'num_classes': 4,
}
PER_CLASS = 6


def pixels(label: int, rng: np.random.Generator) -> np.ndarray:
    """A noisy picture of the class: red or blue, dark or light."""
    brightness = 200 if label % 2 else 90
    picture = rng.normal(0, 25, (32, 32, 3))
    picture[..., 0 if label >= 2 else 2] += brightness
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images, the settings and the checkpoint of a network that tells them apart, and the groups of the classes."""
    folder = tmp_path_factory.mktemp('run')
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        save_images(folder / 'images' / name, (pixels(label, rng) for _ in range(PER_CLASS)))
    (folder / 'args.yaml').write_text(json.dumps(SETTINGS))
    (folder / 'groups.json').write_text(json.dumps(GROUPS))
    torch.manual_seed(0)
    model = timm.create_model(
        SETTINGS['model'], num_classes=4, embed_loss_weight=1, target_kept=0.5, gate_loss_weight=20,
        **SETTINGS['model_kwargs'],
    )  # fmt: skip
    train(model, rng)
    with torch.no_grad():
        model.gating.gates.weight[5] = -1  # an expert that no image keeps
        model.gating.gates.weight[6] = 1
    torch.save(model.state_dict(), folder / 'model.pth')
    return folder


def train(model: nn.Module, rng: np.random.Generator) -> None:
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    criterion = deepmoe_plugin.DeepMoELoss(model, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        labels = torch.arange(16) % 4
        batch = torch.tensor(np.stack([pixels(int(label), rng) for label in labels])).permute(0, 3, 1, 2)
        loss = criterion(model((batch / 255 - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope='module')
def truth(folder):
    """Statistics, MACs and mixtures of the same images, by the library alone; files in the order of the tables."""
    model = timm.create_model(SETTINGS['model'], num_classes=4, **SETTINGS['model_kwargs']).eval()
    model.load_state_dict(torch.load(folder / 'model.pth'))
    cfg = model.pretrained_cfg
    files = [f'{name}/{i}.png' for name in CLASSES for i in range(PER_CLASS)]
    images = np.stack([np.asarray(Image.open(folder / 'images' / file), np.float32) / 255 for file in files])
    x = torch.tensor((images - np.array(cfg['mean'])) / np.array(cfg['std'])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        mixtures = model.gating.embedding(x)
    return gate_statistics(model, x), count_macs(model, x).total / 1e9, mixtures, files


@pytest.fixture
def figure(folder, tmp_path):
    """Runs a sub-command; returns the rows of its table after a look at its picture."""

    def run(command: str, *options: str, ending: str = 'png') -> list[dict[str, str]]:
        out = tmp_path / 'new' / 'folder'
        source = [str(folder / 'args.yaml'), '--checkpoint', str(folder / 'model.pth'), '--workers', '0']
        source += ['--data-dir', str(folder / 'images')]
        analyze.main([command, *(source if '--series' not in options else []), *options, '--out', str(out),
                      '--format', ending])  # fmt: skip
        assert {path.name for path in out.iterdir()} == {f'{command}.{ending}', f'{command}.csv'}
        if ending == 'png':
            picture = np.asarray(Image.open(out / f'{command}.png').convert('RGB'))
            assert min(picture.shape[:2]) > 300
            assert picture[::4, ::4].std() > 5
        else:
            assert b'<svg' in (out / f'{command}.svg').read_bytes()
        with (out / f'{command}.csv').open() as file:
            return list(csv.DictReader(file))

    return run


def column(rows, name):
    return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)


def test_network_is_trained(truth):
    """What the figures show below is there to be shown."""
    stats, gmacs, mixtures, _ = truth
    assert 0.1 < stats.kept_experts < 0.9
    assert gmacs.std() > 0
    assert mixtures.std(0).max() > 0.05


def test_experts_by_layer(figure, truth):
    stats = truth[0]
    rows = figure('experts')
    assert [(row['class'], row['layer']) for row in rows] == [(c, layer) for c in CLASSES for layer in stats.layers]
    labels = torch.arange(4).repeat_interleave(PER_CLASS)
    expected = [part.mean(1) for part in stats.by_class(labels).double().split(stats.widths, 1)]
    torch.testing.assert_close(column(rows, 'kept'), torch.stack(expected, 1).flatten(), rtol=1e-4, atol=1e-5)


def test_single_experts(figure, truth):
    stats = truth[0]
    layers = [stats.layers[2], stats.layers[0]]
    rows = figure('experts', '--layers', *layers)
    assert len(rows) == 4 * (stats.widths[2] + stats.widths[0])
    row = next(row for row in rows if (row['class'], row['layer'], row['expert']) == ('red_dark', layers[1], '3'))
    expected = stats.kept[2 * PER_CLASS : 3 * PER_CLASS, 3].double().mean().item()
    assert float(row['kept']) == pytest.approx(expected, rel=1e-4)


def test_histogram(figure, truth):
    stats, gmacs, _, files = truth
    rows = figure('histogram')
    assert [row['file'] for row in rows] == files
    assert [row['class'] for row in rows] == [file.split('/')[0] for file in files]
    torch.testing.assert_close(column(rows, 'kept_experts'), stats.by_image().double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(column(rows, 'gmacs'), gmacs.double(), rtol=1e-4, atol=0)


def test_extremes(figure, truth):
    _, gmacs, _, files = truth
    count = len(files) // 2
    rows = figure('extremes', '--count', str(count))
    assert [row['side'] for row in rows] == ['cheapest'] * count + ['most expensive'] * count
    ordered = gmacs.double().sort().values
    assert ordered[0] < ordered[count - 1] < ordered[-1]
    expected = torch.cat([ordered[:count], ordered.flip(0)[:count]])
    torch.testing.assert_close(column(rows, 'gmacs'), expected, rtol=1e-4, atol=0)
    for row, value in zip(rows, expected, strict=True):
        assert float(gmacs[files.index(row['file'])]) == pytest.approx(float(value))


@pytest.mark.parametrize('method', ['pca', 'tsne'])
def test_embedding(figure, truth, folder, method):
    mixtures, files = truth[2:]
    rows = figure('embedding', '--method', method, '--groups', str(folder / 'groups.json'))
    assert [row['file'] for row in rows] == files
    assert [row['kind'] for row in rows] == [GROUPS[row['class']] for row in rows]
    points = torch.stack([column(rows, 'x'), column(rows, 'y')], 1)
    if method == 'pca':
        centred = mixtures.double() - mixtures.double().mean(0)
        scale = torch.linalg.svdvals(centred)[:2]
        torch.testing.assert_close(points.norm(dim=0), scale, rtol=1e-3, atol=0)
    centres = torch.stack([points[i::1][:PER_CLASS].mean(0) for i in range(0, 4 * PER_CLASS, PER_CLASS)])
    assert torch.pdist(centres).max() > points[:PER_CLASS].std(0).mean()


def test_embedding_of_some_classes(figure):
    rows = figure('embedding', '--classes', 'red_light', 'blue_dark', ending='svg')
    assert [row['kind'] for row in rows] == ['blue_dark'] * PER_CLASS + ['red_light'] * PER_CLASS


def test_dead(figure, truth):
    stats = truth[0]
    rows = figure('dead')
    assert {row['layer']: int(row['dead']) for row in rows} == stats.dead()
    assert sum(int(row['dead']) for row in rows) > 0
    always = [int(part.all(0).sum()) for part in stats.kept.split(stats.widths, 1)]
    assert [int(row['always_kept']) for row in rows] == always


def test_beyond_the_embedding(figure, truth, folder):
    """By the embedding's read-out, as in `evaluate`; the network's numbers by class are those of `evaluate`, too."""
    rows = figure('beyond')
    assert [row['class'] for row in rows] == CLASSES
    arguments = ['--checkpoint', str(folder / 'model.pth'), '--workers', '0', '--data-dir', str(folder / 'images')]
    summary = evaluate.main([str(folder / 'args.yaml'), *arguments])
    assert [float(row['network']) for row in rows] == pytest.approx([c['top1'] for c in summary['by_class'].values()])
    right = sum(float(row['embedding alone']) * int(row['images']) for row in rows) / summary['images']
    assert right == pytest.approx(100 * summary['handover']['embedding_right'])
    named = 'network, where the embedding is wrong'
    assert all(math.isnan(float(row[named])) == (float(row['embedding alone']) == 100) for row in rows)


@pytest.mark.parametrize('grouped', [True, False])
def test_similarity(figure, truth, folder, grouped):
    stats = truth[0]
    rows = figure('similarity', *(['--groups', str(folder / 'groups.json')] if grouped else []))
    order = [row['class'] for row in rows]
    assert sorted(order) == CLASSES
    if grouped:
        assert order == CLASSES
    usage = stats.by_class(torch.arange(4).repeat_interleave(PER_CLASS))
    usage = usage - usage.mean(0)
    for row in rows:
        for other in CLASSES:
            one, two = (usage[CLASSES.index(name)] for name in (row['class'], other))
            expected = torch.cosine_similarity(one, two, dim=0).item()
            assert float(row[other]) == pytest.approx(expected, abs=1e-3)


def test_shuffle_of_one_class(figure, folder):
    options = ('--groups', str(folder / 'groups.json'), '--classes', 'red_dark', '--repeats', '8')
    rows = figure('shuffle', *options)
    assert {row['donor']: row['group'] for row in rows} == {
        'red_dark': 'own class',
        'red_light': 'in-group',
        'blue_dark': 'out-of-group',
        'blue_light': 'out-of-group',
    }
    assert all(0 <= float(row['accuracy']) <= 100 and row['class'] == 'red_dark' for row in rows)


def test_shuffle_of_all_classes(figure, folder):
    rows = figure('shuffle', '--groups', str(folder / 'groups.json'), '--repeats', '2', '--donors', '1')
    assert len(rows) == 4 * 3
    assert sorted({row['class'] for row in rows}) == CLASSES


def test_shuffling_uses_the_mixtures_of_the_donor(folder, truth):
    """With the mixture of one image for all, all images run with the gates of this image."""
    mixtures = truth[2]
    args = analyze.parse_args(['dead', str(folder / 'args.yaml'), '--data-dir', str(folder / 'images'),
                               '--checkpoint', str(folder / 'model.pth'), '--workers', '0'])[1]  # fmt: skip
    subject = analyze.look(args)
    torch.testing.assert_close(subject.mixtures, mixtures)
    donor = 3 * PER_CLASS
    subject = subject._replace(mixtures=subject.mixtures[donor].expand_as(mixtures).clone())
    model = subject.model
    with torch.no_grad():
        model.fc.weight.normal_(generator=torch.Generator().manual_seed(0))  # a classifier that is often wrong
    groups = [GROUPS[name] for name in CLASSES]
    rows = analyze.shuffle_mixtures(subject, range(4), groups, 1, 2, 5, torch.Generator())
    assert not model.gating.embedding._forward_hooks
    gates = model.gating(subject.images.loader.dataset[donor][0][None])
    model.gating = FixedGates([gate.expand(PER_CLASS, -1) for gate in gates])
    accuracies = set()
    for label in range(4):
        x = torch.stack([subject.images.loader.dataset[label * PER_CLASS + i][0] for i in range(PER_CLASS)])
        expected = 100 * (model(x).argmax(1) == label).double().mean().item()
        own = [row for row in rows if row['class'] == CLASSES[label]]
        assert [row['group'] for row in own] == ['own class', 'in-group', 'out-of-group']
        assert [row['accuracy'] for row in own] == pytest.approx([expected] * 3)
        accuracies.add(expected)
    assert len(accuracies) > 1


@pytest.fixture(scope='module')
def runs(folder, tmp_path_factory):
    """JSON files of `deepmoe evaluate`: a dense network of two widths, a DeepMoE network twice."""
    out = tmp_path_factory.mktemp('runs')
    common = ['--data-dir', str(folder / 'images'), '--workers', '0']
    small = ['--model-kwargs', 'layers=(1,1,1)']
    for name, network in (
        ('dense1', ['resnet20_cifar', *small]),
        ('dense2', ['resnet20_cifar', *small, 'widen=2']),
        ('moe_seed1', [str(folder / 'args.yaml'), '--checkpoint', str(folder / 'model.pth')]),
        ('moe_seed2', [str(folder / 'args.yaml')]),
    ):
        evaluate.main([*network, *common, '--json', str(out / f'{name}.json')])
    return out


@pytest.mark.parametrize('command', ['pareto', 'width'])
def test_figures_of_runs(figure, runs, command):
    names = {'dense': ('dense1', 'dense2'), 'DeepMoE': ('moe_seed1', 'moe_seed2')}
    series = [
        option for title, own in names.items() for option in ('--series', title, *(f'{runs}/{n}.json' for n in own))
    ]
    rows = figure(command, *series)
    assert [row['series'] for row in rows] == ['dense', 'dense', 'DeepMoE', 'DeepMoE']
    assert [float(row['width']) for row in rows] == [1, 2, 2, 2]
    saved = json.loads((runs / 'moe_seed1.json').read_text())
    assert float(rows[2]['top1']) == saved['top1']
    assert float(rows[2]['gmacs']) == saved['gmacs']['mean'] < float(rows[3]['gmacs'])
    assert rows[2]['setting'] == rows[3]['setting'] != rows[0]['setting']


def test_stock_networks_have_no_width(folder, tmp_path, capsys):
    out = tmp_path / 'stock.json'
    evaluate.main(['resnet10t', '--data-dir', str(folder / 'images'), '--img-size', '32', '--workers', '0',
                   '--json', str(out)])  # fmt: skip
    with pytest.raises(SystemExit):
        analyze.main(['width', '--series', 'stock', str(out)])
    assert 'dense twins' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('command', 'options', 'message'),
    [
        ('experts', ['--layers', 'layer9'], 'no gated layer layer9: --layers takes layer1.0.conv1'),
        ('embedding', ['--classes', 'green'], 'no class green: --classes takes blue_dark'),
        ('shuffle', ['--groups', 'none.json'], '--groups none.json is no JSON'),
        ('similarity', ['--groups', 'SHORT'], "leaves out 'red_dark'"),
        ('shuffle', ['--groups', 'ONE'], 'separates nothing'),
        ('pareto', ['--series', 'only_a_name'], 'has no files'),
        ('pareto', ['--series', 'a', 'ONE'], 'no JSON file of `deepmoe evaluate`'),
    ],
)
def test_mistakes_are_named(figure, tmp_path, command, options, message, capsys):
    files = {'SHORT': {'blue_dark': 'blue', 'blue_light': 'blue'}, 'ONE': dict.fromkeys(CLASSES, 'colour')}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    options = [str(tmp_path / option) if option in files else option for option in options]
    with pytest.raises(SystemExit):
        figure(command, *options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


def test_a_long_legend_leaves_room_for_the_map():
    kinds = [f'a long name of a class {i}' for i in range(analyze.figures.MAX_KINDS)]
    figure = analyze.figures.draw_embedding(np.random.default_rng(0).normal(size=(len(kinds), 2)), kinds, ('x', 'y'))
    figure.canvas.draw()
    assert figure.axes[0].get_window_extent().height > 0.7 * figure.bbox.height


def test_more_kinds_than_can_be_told_apart(figure, monkeypatch, capsys):
    monkeypatch.setattr(analyze.figures, 'MAX_KINDS', 3)
    with pytest.raises(SystemExit):
        figure('embedding')
    assert '4 classes cannot be told apart' in capsys.readouterr().err


def test_groups_as_cifar_100_lists_them(tmp_path):
    meta = {'classes': ['a', 'b', 'c'], 'fine_to_coarse': [1, 0, 1], 'coarse_classes': ['x', 'y']}
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    assert analyze.read_groups(tmp_path / 'meta.json', ['c', 'b']) == ['y', 'x']
