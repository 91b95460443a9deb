"""`deepmoe compress`: from a trained dense network to a cheaper gated one."""

import json

import numpy as np
import pytest
import timm
import torch
from image_folders import save_images
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock
from torch import nn

from deepmoe_plugin import set_budget
from deepmoe_plugin.cli import compress, evaluate, timing
from deepmoe_plugin.hints import StageHints

ARGS = ['--epochs', '2', '--batch-size', '16', '--workers', '0']
# Dense networks, each with the arguments that shrink it.
NETWORKS = {
    'resnet20_cifar': dict(layers=(1, 1, 1)),
    'convnext_atto': dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), patch_size=1, ls_init_value=1.0),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of two classes, bright and dark, and dense networks."""
    root = tmp_path_factory.mktemp('compress')
    random = np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 8)):
        for label, base in (('bright', 170), ('dark', 60)):
            pictures = (random.normal(base, 40, (32, 32, 3)) for _ in range(count))
            save_images(root / 'data' / split / label, pictures)
    for name, arguments in NETWORKS.items():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=2, **arguments)
        for block in model.modules():
            if isinstance(block, BasicBlock):
                torch.nn.init.ones_(block.bn2.weight)  # zero in a new network, which would need none of its experts
        save_file(model.state_dict(), root / f'{name}.safetensors')
    return root


def run(folder, output, *more, network='resnet20_cifar', **arguments):
    arguments = {**NETWORKS[network], **arguments}
    shrunk = ['--model-kwargs', *(f'{name}={value}'.replace(' ', '') for name, value in arguments.items())]
    data = ['--checkpoint', str(folder / f'{network}.safetensors'), '--data-dir', str(folder / 'data')]
    return compress.main([network, *data, '--img-size', '32', '--output', str(output), *shrunk, *ARGS, *more])


@pytest.mark.parametrize(
    ('network', 'arguments'),
    [
        ('resnet20_cifar', {}),
        ('resnet20_cifar', dict(experts_per_gate=4)),
        ('convnext_atto', dict(embedding_channels=(8, 8))),
    ],
    ids=str,
)
def test_network_spends_the_budget_and_its_weights_load(folder, tmp_path, network, arguments):
    normalisation = ['--mean', '0.3', '0.4', '0.5', '--std', '0.2', '0.2', '0.2']
    summary = run(folder, tmp_path, '--macs', '0.6', *normalisation, network=network, **arguments)
    dense, gated = summary['results']
    assert gated['gmacs'] / dense['gmacs'] == pytest.approx(0.6, abs=0.06)
    assert gated['kept_experts'] < 1
    assert 0 <= gated['embedding_right'] <= 1
    assert gated['gate_entropy'] <= gated['use_entropy']
    assert (tmp_path / 'experts.png').stat().st_size > 1000
    assert json.loads((tmp_path / 'results.json').read_text())['results'] == summary['results']
    assert (tmp_path / 'results.md').read_text().count('\n') == 4
    model = timm.create_model(summary['network'], **summary['model_kwargs'])
    model.load_state_dict(load_file(tmp_path / 'compressed.safetensors'), strict=False)
    assert model.gating.gates.threshold > 0
    options = ['--checkpoint', str(tmp_path / 'compressed.safetensors'), '--data-dir', str(folder / 'data')]
    measured = evaluate.main([str(tmp_path / 'args.yaml'), *options, '--workers', '0'])
    assert measured['top1'] == pytest.approx(gated['top1'])
    assert measured['gmacs']['mean'] == pytest.approx(gated['gmacs'])


def test_resumed_run_ends_as_one_that_was_not_interrupted(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / 'whole')
    saved = compress._save

    def save_and_stop(*args):
        saved(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compress, '_save', save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / 'parts')
    parts = run(folder, tmp_path / 'parts', '--resume')
    assert parts['results'] == whole['results']
    first, second = (load_file(tmp_path / name / 'compressed.safetensors') for name in ('whole', 'parts'))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_range_of_budgets_makes_one_network_of_all_of_them(folder, tmp_path):
    summary = run(folder, tmp_path, '--macs', '0.55', '0.75', '--stage2', '0.5')
    dense, *rows = summary['results']
    assert [row['name'] for row in rows] == [f'gated, 2 epochs, at {macs}' for macs in (0.75, 0.65, 0.55)]
    spent = [row['gmacs'] / dense['gmacs'] for row in rows]
    assert spent == pytest.approx([0.75, 0.65, 0.55], abs=0.06)
    model = timm.create_model(summary['network'], **summary['model_kwargs'])
    model.load_state_dict(load_file(tmp_path / 'compressed.safetensors'), strict=False)
    smallest = model.gating.gates.threshold.item()
    trained = torch.load(tmp_path / 'gated/last.pth', weights_only=True)['model']
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            same = torch.equal(norm.running_mean, trained[f'{name}.running_mean'])
            assert same == name.startswith('gating.'), name  # measured anew for the last budget
    set_budget(model, macs=0.7)
    assert 0 < model.gating.gates.threshold < smallest


def test_stages_of_the_dense_network_are_hints(folder, tmp_path):
    """With them alone, the stages of the compressed network end nearer to those of the dense one."""
    dense = timm.create_model('resnet20_cifar', num_classes=2, **NETWORKS['resnet20_cifar']).eval()
    dense.load_state_dict(load_file(folder / 'resnet20_cifar.safetensors'))
    images = torch.cat([torch.normal(base, 40, (16, 3, 32, 32)) for base in (170.0, 60.0)]) / 255
    images = (images - 0.47) / 0.24  # about as the command prepares them
    errors = []
    for hint in ('0', '5'):
        rates = ['--lr', '0.05', '--epochs', '4']
        summary = run(folder, tmp_path / hint, '--macs', '0.6', '--distill', '0', '--hint', hint, *rates)
        model = timm.create_model(summary['network'], **summary['model_kwargs'])
        model.load_state_dict(load_file(tmp_path / hint / 'compressed.safetensors'))
        with torch.no_grad(), StageHints(model, dense) as hints:
            model(images), dense(images)
            errors.append(hints.take().item())
    assert errors[1] < 0.8 * errors[0]


def test_without_stage_2_the_budget_is_known_at_the_end(folder, tmp_path):
    summary = run(folder, tmp_path, '--macs', '0.6', '--stage2', '0')
    dense, gated = summary['results']
    assert gated['gmacs'] / dense['gmacs'] == pytest.approx(0.6, abs=0.06)
    assert load_file(tmp_path / 'compressed.safetensors')['gating.curve.points'].any()
    assert run(folder, tmp_path, '--macs', '0.6', '--stage2', '0', '--resume')['results'] == summary['results']


def test_the_optimizer_is_the_one_that_was_asked_for(folder, tmp_path):
    run(folder, tmp_path / 'out', '--opt', 'muon', '--epochs', '1')
    states = torch.load(tmp_path / 'out/gated/last.pth', weights_only=True)['optimizer']['state'].values()
    assert {key for state in states for key in state} >= {'momentum_buffer', 'exp_avg'}  # of matrices, and of the rest


def test_warm_start_gets_the_share_of_dynamic_experts(folder, tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr(compress, 'warm_start', lambda *_, dynamic_experts: shares.append(dynamic_experts))
    monkeypatch.setattr(compress, 'train', lambda _name, model, *_: model.eval())
    run(folder, tmp_path, '--dynamic-experts', '0.4')
    assert shares == [0.4]


def test_times_of_one_image(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, 'REPEATS', 3)
    monkeypatch.setattr(compress, 'train', lambda _name, model, *_: model.eval())
    summary = run(folder, tmp_path, '--baselines', 'dense', '--time', 'torch')
    assert [row['engine'] for row in summary['results']] == ['torch', 'torch', 'sparse']
    assert all(row['ms'] > 0 for row in summary['results'])
    assert summary['time']['threads'] >= 1
    assert '(sparse) |' in (tmp_path / 'results.md').read_text()
    assert (tmp_path / 'time.png').stat().st_size > 1000


def test_the_fastest_way_counts(monkeypatch):
    seconds = {}

    def engine(takes):
        def build(model, x):
            seconds[model] = takes
            return model

        return build

    monkeypatch.setattr(timing, 'measure', lambda call, clock: seconds[call.func])
    monkeypatch.setattr(timing, 'ENGINES', {'slow': engine(0.003), 'quick': engine(0.001), 'wrong': _wrong_engine})
    networks = {'dense': torch.nn.Conv2d(3, 4, 3)}
    found = timing.time_of_an_image(networks, [torch.zeros(1, 3, 8, 8)], ['slow', 'quick', 'wrong'])
    assert found == {'dense': (pytest.approx(1.0), 'quick')}
    with pytest.raises(ValueError, match='none of wrong runs dense here'):
        timing.time_of_an_image(networks, [torch.zeros(1, 3, 8, 8)], ['wrong'])


def _wrong_engine(model, x):
    return lambda image: model(image) + 1  # computes something else, in no time


def test_baseline_trains_as_long(folder, tmp_path):
    rows = run(folder, tmp_path, '--baselines', 'dense', '--channels-last', '--amp')['results']
    assert [row['name'] for row in rows] == ['dense', 'dense, 2 epochs', 'gated, 2 epochs']
    assert rows[0]['gmacs'] == rows[1]['gmacs']


def test_small_images_are_shifted_and_the_last_threshold_is_set_on_images_as_they_are_tested(folder):
    """Crops that are scaled up are blurred, and gates see that."""
    _, args = compress.parse_args(['resnet20_cifar', '--data-dir', str(folder / 'data'), *ARGS])
    settings = compress.read_settings('resnet20_cifar', args)
    shifted, tested = (compress.training_loader(args, settings, augment).dataset for augment in (True, False))
    assert not any('Random' in type(step).__name__ for step in tested.transform.transforms)
    original = tested[0][0]
    normalise = tested.transform.transforms[-1]
    black = (-normalise.mean / normalise.std)[:, None, None]
    seen = set()
    torch.manual_seed(0)
    for _ in range(20):
        image = shifted[0][0]
        padded = torch.nn.functional.pad(original - black, (4, 4, 4, 4)) + black
        places = [
            (y, x, flip)
            for y in range(9)
            for x in range(9)
            for flip in (False, True)
            if torch.allclose(image, (padded.flip(2) if flip else padded)[:, y : y + 32, x : x + 32], atol=1e-6)
        ]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 10
    assert len({flip for _, _, flip in seen}) == 2


def test_larger_images_are_cut_as_timm_does_it(folder):
    _, args = compress.parse_args(['resnet18', '--data-dir', str(folder / 'data')])
    dataset = compress.training_loader(args, compress.read_settings('resnet18', args)).dataset
    assert type(dataset.transform.transforms[0]).__name__ == 'RandomResizedCropAndInterpolation'


@pytest.mark.parametrize(
    ('name', 'gated'),
    [
        ('resnet50', 'narrow_deepmoe_resnet50'),
        ('resnet50.a1_in1k', 'narrow_deepmoe_resnet50'),
        ('wide_resnet50_2', 'wide_deepmoe_resnet50'),
        ('vgg16_bn', 'narrow_deepmoe_vgg16_bn'),
        ('wide_deepmoe_resnet18', 'wide_deepmoe_resnet18'),
    ],
)
def test_gated_twin(name, gated):
    assert compress.gated_twin(name) == gated


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        (['--macs', '1.5'], '--macs must be a fraction'),
        (['--macs', '0.05'], 'A budget of 0.05 cannot be reached'),
        (['--macs', '0.7', '0.6'], '--macs takes one fraction, or a smaller and a larger one'),
        (['--epochs', '0'], '--epochs must be at least 1'),
        (['--distill', '2'], '--distill must be a fraction'),
        (['--hint', '-1'], '--hint must not be negative'),
        (['--opt', 'muonn'], "no optimizer 'muonn'. Similar: muon"),
        (['--dynamic-experts', '2'], '--dynamic-experts must be a fraction'),
    ],
)
def test_refused_before_any_work(folder, tmp_path, capsys, more, words):
    with pytest.raises(SystemExit):
        run(folder, tmp_path / 'out', *more)
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_a_network_without_a_gated_twin_is_refused(capsys):
    with pytest.raises(SystemExit):
        compress.main(['mobilenetv3_small_100', '--data-dir', 'nowhere'])
    assert 'no gated twin' in capsys.readouterr().err


def test_gated_weights_of_the_package_are_refused_as_those_of_a_dense_network(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compress.main(['wide_deepmoe_resnet20_cifar', '--data-dir', str(folder / 'data'), '--num-classes', '100'])
    assert 'checkpoint of a gated network' in capsys.readouterr().err
